"""DiaNA: chat-based person retrieval by dialogue-refined cross-modal alignment (CVPR 2025).

The names listed in `__init__.pyi` are loaded on first use, so that importing the package costs nothing and `--help` answers
at once.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
