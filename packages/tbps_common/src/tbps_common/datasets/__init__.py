"""Readers of the person-retrieval data sets: annotation files in, lists of records with image paths out.

Nothing here imports torch, looks at the images while loading, or downloads anything.
"""

from tbps_common.datasets.chatpedes import load_chatpedes
from tbps_common.datasets.itcpr import ITCPR
from tbps_common.datasets.mals import load_mals
from tbps_common.datasets.processed import load_processed_eval, load_processed_train
from tbps_common.datasets.raw import CUHKPEDES, DATASETS, ICFGPEDES, RSTPReid
from tbps_common.datasets.records import read_json
from tbps_common.datasets.sda import load_sda
from tbps_common.datasets.syncpr import load_syncpr
from tbps_common.errors import DatasetError
from tbps_common.images import read_image

__all__ = [
    "CUHKPEDES",
    "DATASETS",
    "ICFGPEDES",
    "ITCPR",
    "DatasetError",
    "RSTPReid",
    "load_chatpedes",
    "load_mals",
    "load_processed_eval",
    "load_processed_train",
    "load_sda",
    "load_syncpr",
    "read_image",
    "read_json",
]
