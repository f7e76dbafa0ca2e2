"""Data sets, image transforms and the loader of training batches."""

import lazy_loader

# The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
