"""FAFA inside LAVIS: `import fafa.lavis_plugin` registers `blip2_fafa_cpr` in LAVIS's registry.

The code is in `packages/fafa/lavis`, a project of its own, because LAVIS pins libraries of 2022. In this package's own
environment `fafa.load_model_and_preprocess` does the same without LAVIS.
"""

try:
    from fafa_lavis import LavisFAFACPR  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "fafa.lavis_plugin needs LAVIS 1.0.2, in its own environment: make one with Python 3.11, and run "
        f"pip install packages/fafa/lavis there ({error})."
    ) from error

__all__ = ["LavisFAFACPR"]
