"""Training: flags of old and new transformers, the run from start to end, checkpoints, launchers."""
