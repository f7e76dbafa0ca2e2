"""What an evaluation leaves behind: one JSON file, ranked-list pictures and CMC curves.

The modules are `tbps_common.report.evaluation` (the JSON schema) and `tbps_common.report.pictures` (PNG files). Drawing
libraries are loaded when a picture is drawn, not before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbps_common.report.evaluation import evaluation_from_result, read_evaluation, write_evaluation
    from tbps_common.report.pictures import Hit, RankedQuery, cmc_curve, ranked_list

__all__ = [
    "Hit",
    "RankedQuery",
    "cmc_curve",
    "evaluation_from_result",
    "ranked_list",
    "read_evaluation",
    "write_evaluation",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source = "evaluation" if "evaluation" in name else "pictures"
    return getattr(import_module(f"{__name__}.{source}"), name)
