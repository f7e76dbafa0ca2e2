"""Captions, images and batches: annotations, tokenizer, transforms, items, samplers, loaders."""

import lazy_loader

# Lazy, because the checks before a run must not import torch. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
