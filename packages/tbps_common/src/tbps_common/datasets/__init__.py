"""Readers of the person-retrieval data sets: annotation files in, lists of records with image paths out.

One module for each data set; `json_records` reads what they have in common, `finetune` also writes. `tbps-data check` is
`check`, with what it looks at in `inventory`. Nothing here imports torch, looks at the images while loading, or downloads
anything.
"""

from typing import TYPE_CHECKING, Any

from tbps_common.datasets.chatpedes import ChatPedesImage, load_chatpedes, read_chatpedes
from tbps_common.datasets.finetune import ProcessedEval, ProcessedTrain, load_processed_eval, load_processed_train
from tbps_common.datasets.itcpr import ITCPR
from tbps_common.datasets.json_records import Folder, Record, iter_records, read_json
from tbps_common.datasets.mals import load_mals
from tbps_common.datasets.raw import CUHKPEDES, DATASETS, ICFGPEDES, RSTPReid
from tbps_common.datasets.sda import load_sda
from tbps_common.datasets.syncpr import SynCPRRecord, SynCPRRecords, load_syncpr
from tbps_common.errors import DatasetError

if TYPE_CHECKING:
    from tbps_common.images import read_image

__all__ = [
    "CUHKPEDES",
    "DATASETS",
    "ICFGPEDES",
    "ITCPR",
    "ChatPedesImage",
    "DatasetError",
    "Folder",
    "ProcessedEval",
    "ProcessedTrain",
    "RSTPReid",
    "Record",
    "SynCPRRecord",
    "SynCPRRecords",
    "iter_records",
    "load_chatpedes",
    "load_mals",
    "load_processed_eval",
    "load_processed_train",
    "load_sda",
    "load_syncpr",
    "read_chatpedes",
    "read_image",
    "read_json",
]


def __getattr__(name: str) -> Any:
    if name == "read_image":  # when it is asked for: `tbps-data --help` needs neither Pillow nor NumPy
        from tbps_common.images import read_image

        return read_image
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
