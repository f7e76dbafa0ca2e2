"""Retrieval with a DiaNA model: features of images and dialogues, scores, and the evaluation of a data set.

Importing this package does not load torch. The names are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
