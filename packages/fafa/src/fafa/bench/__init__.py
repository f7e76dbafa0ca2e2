"""`python -m fafa.bench`: this package against the direct forms of the method, equality checked, ratios printed."""
