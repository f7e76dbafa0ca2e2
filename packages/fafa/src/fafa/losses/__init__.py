"""The training objectives of FAFA, in plain torch: nothing here needs transformers.

* `alignment`: fine-grained dynamic alignment (FDA): token similarity, its pooling, the SDM loss;
* `dispersion`: feature diversity (FD);
* `reasoning`: masked feature reasoning (MFR);
* `uncertainty`: distribution uncertainty (DSU), noise on the statistics of the target tokens;
* `optional`: hard-negative NCE, MMD and CORAL, all off by default.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fafa.losses.alignment import compute_sdm, contrastive_loss, pool_tokens, token_similarity
    from fafa.losses.dispersion import FeatureDispersionLoss
    from fafa.losses.optional import HardNegativeNCE, coral_loss, mmd_loss
    from fafa.losses.reasoning import MaskedFeaturePrediction
    from fafa.losses.uncertainty import DistributionUncertainty

__all__ = [
    "DistributionUncertainty",
    "FeatureDispersionLoss",
    "HardNegativeNCE",
    "MaskedFeaturePrediction",
    "compute_sdm",
    "contrastive_loss",
    "coral_loss",
    "mmd_loss",
    "pool_tokens",
    "token_similarity",
]

_HOME = {
    "DistributionUncertainty": "uncertainty",
    "FeatureDispersionLoss": "dispersion",
    "HardNegativeNCE": "optional",
    "MaskedFeaturePrediction": "reasoning",
    "compute_sdm": "alignment",
    "contrastive_loss": "alignment",
    "coral_loss": "optional",
    "mmd_loss": "optional",
    "pool_tokens": "alignment",
    "token_similarity": "alignment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
