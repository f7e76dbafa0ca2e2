"""Time and memory of the ranking of this package beside the bare matrix product and other ways to the same numbers."""
