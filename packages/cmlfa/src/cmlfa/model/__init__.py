"""The model side of CMLFA: network, start weights, checkpoints. It never imports the training side."""

import lazy_loader

# Lazy, because the options of a command come from here too. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
