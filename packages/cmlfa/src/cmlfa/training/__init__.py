"""The training side of CMLFA: one run from its flags to its run directory."""
