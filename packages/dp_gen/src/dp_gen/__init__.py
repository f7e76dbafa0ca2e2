"""Diverse Person: an editor that makes training data for text-based person search."""

import lazy_loader

__version__ = "0.1.0"

IMAGE_TOKEN = "<|image|>"
"""Stands in a caption after each phrase that has a reference image. FastComposer's and DP's inference name it so; the
default of the released training class is an empty string, for which padding would count as image tokens."""

# On first use, so that importing the package costs nothing and `--help` answers at once. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
