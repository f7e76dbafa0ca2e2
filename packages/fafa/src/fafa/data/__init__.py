"""The data sets of composed person retrieval: SynCPR to train on, ITCPR to test on."""

from fafa.data.collate import collate_fn
from fafa.data.itcpr import GalleryDataset, ITCPRDataset, QueryDataset
from fafa.data.syncpr import SynCPRDataset

__all__ = ["GalleryDataset", "ITCPRDataset", "QueryDataset", "SynCPRDataset", "collate_fn"]
