"""Captions on their way into the model: cleaning, augmentation, token ids, masking.

The names are loaded on first use: the vocabulary and WordNet are checked before torch is imported.
"""

import lazy_loader

# The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
