"""Training data: the folder of images, masks and captions; its items; reference images."""

import lazy_loader

# On first use: `layout` is read before torch is imported. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
