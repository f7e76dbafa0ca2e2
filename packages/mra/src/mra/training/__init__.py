"""The training side of MRA: one run from its flags to its output folder."""
