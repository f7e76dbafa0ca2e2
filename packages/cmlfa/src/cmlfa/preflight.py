"""Checks of the data that need no model: made before torch is imported, so that a wrong path is told within a second."""

from typing import Any

from tbps_common.errors import DatasetError, InputError
from tbps_common.images import check_images_exist

_SHOWN = 5


def check_data(dataset_name: str, root_dir: str, *, split: str, training: bool, i2t: bool = False) -> Any:
    """Read the annotations and check that a run can use them.

    Args:
        dataset_name: CUHK-PEDES, ICFG-PEDES or RSTPReid.
        root_dir: folder that holds the data set's folder.
        split: the one to evaluate, `test` or `val`.
        training: whether the training split is needed too.
        i2t: whether every image must have a caption of its person too.

    Returns:
        The data set as `tbps_common.datasets` reads it.

    Raises:
        DatasetError: the data set is missing or damaged, a split is empty, images are missing, or a query has no image
            to find.
        InputError: the data set's name is unknown.
    """
    from tbps_common.datasets import DATASETS

    if dataset_name not in DATASETS:
        raise InputError(f"--dataset_name {dataset_name} is unknown: choose one of {', '.join(DATASETS)}")
    data = DATASETS[dataset_name](root_dir, verbose=False)
    if training and not data.train:
        raise DatasetError(f"{data.anno_path} has no caption in its training split, so there is nothing to train on")
    evaluated = getattr(data, split)
    if not evaluated["image_pids"] or not evaluated["caption_pids"]:
        raise DatasetError(
            f"{data.anno_path} has {len(evaluated['image_pids'])} images and {len(evaluated['caption_pids'])} captions "
            f"in its {split} split, so nothing can be evaluated: choose another split with --val_dataset, or complete "
            "the annotations"
        )
    _require_positives(evaluated["caption_pids"], evaluated["image_pids"], f"captions of {data.anno_path}", "image")
    if i2t:
        _require_positives(evaluated["image_pids"], evaluated["caption_pids"], f"images of {data.anno_path}", "caption")
    paths = set(evaluated["img_paths"])
    if training:
        paths.update(path for _, _, path, _ in data.train)
    check_images_exist(paths, root_dir, flag="--root_dir")
    return data


def _require_positives(queries: list[int], gallery: list[int], what: str, wanted: str) -> None:
    without = sorted(set(queries) - set(gallery))
    if without:
        shown = ", ".join(map(str, without[:_SHOWN])) + (", ..." if len(without) > _SHOWN else "")
        raise DatasetError(
            f"the {what} show {len(without)} persons (ids {shown}) without any {wanted} in the same split, so their "
            "rank is not defined: complete or remove these records"
        )
