"""The model side of MRA: network, sizes, weights from files. It never imports the training side."""

import lazy_loader

# The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
