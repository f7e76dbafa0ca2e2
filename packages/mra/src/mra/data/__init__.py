"""Data sets, image transforms and loaders of the three stages: pre-training, fine-tuning, evaluation."""

from mra.data.datasets import FinetuneDataset, PretrainDataset, RetrievalTestDataset
from mra.data.erasing import RandomErasing
from mra.data.regions import region_attention
from mra.data.transforms import build_transforms

__all__ = [
    "FinetuneDataset",
    "PretrainDataset",
    "RandomErasing",
    "RetrievalTestDataset",
    "build_transforms",
    "region_attention",
]
