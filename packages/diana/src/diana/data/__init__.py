"""Data of DiaNA: dialogue texts, annotation files, image transforms, masking, and the training items.

Importing this package loads neither torch nor torchvision. The names are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
