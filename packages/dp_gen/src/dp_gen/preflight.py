"""Checks that need no model: made before torch is imported, so that a wrong path is told within a second."""

import argparse
import os
from collections import Counter

from dp_gen.data_layout import FolderLayout, require_files
from dp_gen.hub import check_model_folders
from dp_gen.options import attribute_types
from tbps_common.errors import DatasetError


def check_training_inputs(args: argparse.Namespace) -> None:
    """Check the training folder and the models' folders.

    Raises:
        DatasetError: files are missing or damaged, or no sample has a segment of the wanted types.
        InputError: a model's folder is not one.
    """
    check_model_folders(args)
    layout = FolderLayout(args.dataset_name, "train")
    require_files(layout)
    wanted = attribute_types(args)
    labels = Counter(segment["label"] for img_id in layout.ids for segment in layout.read_info(img_id)["segments"])
    if wanted is not None and labels and not wanted & set(labels):
        known = ", ".join(sorted(str(label) for label in labels))
        raise DatasetError(
            f"--reference_attribute_types {args.reference_attribute_types} names none of the types in {layout.root} "
            f"({known}): no reference would be trained"
        )
    if args.load_model and not os.path.exists(args.load_model):
        raise DatasetError(f"--load_model {args.load_model} does not exist: check the path")
