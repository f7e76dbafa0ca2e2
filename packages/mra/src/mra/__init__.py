"""MRA: text-based person retrieval, pre-trained on generated images with region phrases, fine-tuned, re-ranked.

The names are loaded on first use, so that importing the package costs nothing and `--help` answers at once.
"""

import lazy_loader

__version__ = "0.1.0"

# The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
