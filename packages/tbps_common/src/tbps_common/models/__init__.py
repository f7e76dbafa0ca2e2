"""Trained models as files: what a file holds, the layout of the Hugging Face hub, conversion and export (`tbps-model`)."""
