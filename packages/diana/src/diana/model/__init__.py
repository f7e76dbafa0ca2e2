"""The model side of DiaNA: towers, refiner, checkpoints. It never imports the training side.

The names are listed in `__init__.pyi` and loaded on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
