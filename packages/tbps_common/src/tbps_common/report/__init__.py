"""What an evaluation leaves behind: one JSON file (`evaluation`), and as PNG files (`pictures`) grids, ranked lists, CMC curves."""

import lazy_loader

# Lazy, because a command that only prints its help must not import what draws. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
