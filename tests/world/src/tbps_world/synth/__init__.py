"""Synthetic pedestrians: a licence-free world of drawn people, captions, dialogues, regions and outfit changes.

The world exists to run every command of the five papers on a laptop and to show that a model learns; it is a teaching
and test instrument, not a benchmark. Nothing in this package imports torch.
"""
