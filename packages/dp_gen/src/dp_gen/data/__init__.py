"""Training data: the folder of images, masks and captions; its items; reference images."""

from dp_gen.data.check import check_dataset
from dp_gen.data.folder import TrainingFolder
from dp_gen.data.items import DiversePersonDataset, collate_fn
from dp_gen.data.references import read_references
from dp_gen.data.transforms import (
    Transform4TestWithSegmap,
    Transform4TrainWithSegmap,
    attribute_transforms,
    cut_attribute,
)

__all__ = [
    "DiversePersonDataset",
    "TrainingFolder",
    "Transform4TestWithSegmap",
    "Transform4TrainWithSegmap",
    "attribute_transforms",
    "check_dataset",
    "collate_fn",
    "cut_attribute",
    "read_references",
]
