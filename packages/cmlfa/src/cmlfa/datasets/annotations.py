"""The data sets, and whether a run can use one: read and checked without torch, so that a wrong path is found at once."""

from cmlfa.options import Options
from tbps_common.datasets import CUHKPEDES, DATASETS, ICFGPEDES, RSTPReid
from tbps_common.datasets.raw import RawDataset
from tbps_common.errors import DatasetError
from tbps_common.images import check_images_exist

__all__ = ["CUHKPEDES", "DATASETS", "ICFGPEDES", "RSTPReid", "read_annotations"]

_SHOWN = 5


def read_annotations(options: Options, split: str, *, training: bool = False, i2t: bool = False) -> RawDataset:
    """Read the annotations of `options.dataset_name` and check that a run can use them.

    Args:
        options: of the run.
        split: the one to evaluate, `test` or `val`.
        training: whether the training split is needed too.
        i2t: whether every image must have a caption of its person too.

    Raises:
        DatasetError: the data set is missing or damaged, a split is empty, images are missing, or a query has no image
            to find.
    """
    data = DATASETS[options.dataset_name](options.root_dir, verbose=False)
    if training and not data.train:
        raise DatasetError(f"{data.anno_path} has no caption in its training split, so there is nothing to train on")
    evaluated = getattr(data, split)
    if not evaluated["image_pids"] or not evaluated["caption_pids"]:
        raise DatasetError(
            f"{data.anno_path} has {len(evaluated['image_pids'])} images and {len(evaluated['caption_pids'])} captions "
            f"in its {split} split, so nothing can be evaluated: choose the other split with --val_dataset, or complete "
            "the annotations"
        )
    _require_positives(evaluated["caption_pids"], evaluated["image_pids"], f"captions of {data.anno_path}", "image")
    if i2t:
        _require_positives(evaluated["image_pids"], evaluated["caption_pids"], f"images of {data.anno_path}", "caption")
    paths = set(evaluated["img_paths"])
    if training:
        paths.update(path for _, _, path, _ in data.train)
    check_images_exist(paths, options.root_dir, flag="--root_dir")
    return data


def _require_positives(queries: list[int], gallery: list[int], what: str, wanted: str) -> None:
    without = sorted(set(queries) - set(gallery))
    if without:
        shown = ", ".join(map(str, without[:_SHOWN])) + (", ..." if len(without) > _SHOWN else "")
        raise DatasetError(
            f"the {what} show {len(without)} persons (ids {shown}) without any {wanted} in the same split, so their "
            "rank is not defined: complete or remove these records"
        )
