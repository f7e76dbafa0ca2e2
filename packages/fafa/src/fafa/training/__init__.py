"""The training side of FAFA: one run from its flags to its run directory."""
