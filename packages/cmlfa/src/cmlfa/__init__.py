"""CMLFA: cross-modal latent feature aligning for text-to-image person re-identification."""

import lazy_loader

__version__ = "0.1.0"
# Lazy, so that `--help` answers at once. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
