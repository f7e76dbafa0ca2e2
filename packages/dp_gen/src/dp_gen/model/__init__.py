"""The model: text encoder, image encoder, controller, U-Net with captured attention, VAE; its files and folders."""

import lazy_loader

# On first use: `hub` is needed before torch is imported. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
