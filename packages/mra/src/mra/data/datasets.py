"""The items of pre-training, fine-tuning and evaluation. All draws come from `rng`, in the released order."""

import logging
import os
import random
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mra.data.regions import box_in_pixels, crop_around, region_attention
from mra.data.transforms import Transform, build_transforms
from mra.text.augmentation import pre_caption
from mra.text.wordnet import synonyms_of
from tbps_common.datasets import ProcessedEval, ProcessedTrain, load_processed_eval, load_processed_train, load_sda
from tbps_common.datasets.sda import SDA
from tbps_common.errors import DatasetError
from tbps_common.images import read_image
from tbps_common.packed import PackedNumbers, PackedStrings

logger = logging.getLogger("mra.data")

WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)


class _Captions:
    """Captions of one configuration; `caption` and `augmented` say which record a bad one comes from."""

    def __init__(self, config: dict[str, Any], rng: Any):
        self.max_words: int = config["max_words"]
        self.clean = bool(config.get("icfg_rstp", False))
        self.eda = bool(config.get("eda", False))
        self.synonyms = synonyms_of(config) if self.eda else None
        # The module itself cannot be sent to a loader process; None stands for it.
        self._rng = None if rng is random else rng

    @property
    def rng(self) -> Any:
        return random if self._rng is None else self._rng

    def prepare(self, text: str, image: str, *, eda: bool = False, clean: bool | None = None) -> str:
        clean = self.clean if clean is None else clean
        try:
            return pre_caption(text, self.max_words, clean, eda, rng=self.rng, synonyms=self.synonyms)
        except ValueError as error:
            raise DatasetError(f"{error} (image {image}): correct or remove this record") from error

    def both(self, text: str, image: str) -> tuple[str, Any]:
        """The caption, and its augmented form or `{}` where the task has none."""
        caption = self.prepare(text, image)
        return caption, self.prepare(text, image, eda=True) if self.eda else {}


class PretrainDataset(Dataset[Any]):
    """SDA: images with a caption, and one random region with its phrase.

    An item is `(image [3, h, w], caption, augmented caption or {}, box_atts [1 + tokens], phrase, label, idx)`. `idx`
    numbers the images, `label` the phrases after them; a record without a usable box stands for its whole image, with
    its caption as phrase and its idx as label.

    Args:
        config: `train_file_regions`, `image_root`, `h`, `w`, `patch_size`, `erasing_p`, `max_words`, `icfg_rstp`, `eda`.
        transform: of the cropped picture; by default the `box` transform of `build_transforms`.
        rng: generator of all draws; the default, Python's global one, is the one that loader processes reseed.
        data: the annotation, if it has been read already.

    Raises:
        DatasetError: an annotation file cannot be used.
    """

    def __init__(
        self, config: dict[str, Any], transform: Transform | None = None, rng: Any = random, *, data: SDA | None = None
    ):
        data = load_sda(config["train_file_regions"], config["image_root"]) if data is None else data
        self.records = data.records
        self.size = config["h"], config["w"]
        self.patch_size: int = config["patch_size"]
        self.transform = build_transforms(config, rng)["box"] if transform is None else transform
        self._captions = _Captions(config, rng)
        self.bad_boxes = 0
        """Boxes met so far (in this process) that lie outside their picture or have no area."""

    def __len__(self) -> int:
        return len(self.records)

    def image_path(self, index: int) -> str:
        return self.records.image_paths[index]

    def __getitem__(self, index: int) -> tuple[Tensor, str, Any, Tensor, str, int, int]:
        record, rng = self.records[index], self._captions.rng
        image = read_image(record.image_path)
        box, chosen = None, -1
        if record.boxes:
            chosen = rng.choice(range(len(record.boxes)))
            centre_x, centre_y, w, h = record.boxes[chosen]
            box = box_in_pixels((centre_x, centre_y, w, h), *image.size)
            if box is None:
                self._note_bad_box(record.image_path, record.boxes[chosen])
                chosen = -1
        if box is None:
            box = box_in_pixels(WHOLE_IMAGE, *image.size)
            assert box is not None
        cropped, box = crop_around(image, box, self.size, rng)
        tensor = self.transform(cropped)
        atts = self._box_tokens(box, rng)
        caption, augmented = self._captions.both(record.caption, record.image_path)
        if chosen < 0:
            return tensor, caption, augmented, atts, caption, record.image_label, record.image_label
        phrase = self._captions.prepare(record.phrases[chosen], record.image_path, clean=False)
        return tensor, caption, augmented, atts, phrase, record.phrase_labels[chosen], record.image_label

    def _box_tokens(self, box: Any, rng: Any) -> Tensor:
        grid = self.size[0] // self.patch_size, self.size[1] // self.patch_size
        atts = region_attention(box.x, box.y, box.w, box.h, self.patch_size, *grid)
        # The released code compares one draw per covered token with 1; later draws of the item depend on it.
        for _ in range(int((atts == 0).sum())):
            rng.random()
        return atts

    def _note_bad_box(self, path: str, box: list[float]) -> None:
        self.bad_boxes += 1
        if self.bad_boxes & (self.bad_boxes - 1) == 0:  # 1, 2, 4, 8, ...
            logger.warning(
                "%s: the box %s has no area inside its picture; the whole picture is used (%d such boxes so far)",
                path,
                box,
                self.bad_boxes,
            )


class FinetuneDataset(Dataset[Any]):
    """Training pairs of CUHK-PEDES, ICFG-PEDES or RSTPReid.

    An item is `(image [3, h, w], caption, augmented caption or {}, {}, {}, {}, idx)`; `idx` numbers the persons.

    Args:
        config: `train_file`, `image_root`, `h`, `w`, `erasing_p`, `max_words`, `icfg_rstp`, `eda`.
        transform: of the picture; by default the `train` transform of `build_transforms`.
        rng: see `PretrainDataset`; the same for `data`.

    Raises:
        DatasetError: an annotation file cannot be used.
    """

    def __init__(
        self,
        config: dict[str, Any],
        transform: Transform | None = None,
        rng: Any = random,
        *,
        data: ProcessedTrain | None = None,
    ):
        data = load_processed_train(config["train_file"], config["image_root"]) if data is None else data
        self.image_paths, self.captions = PackedStrings(data.image_paths), PackedStrings(data.captions)
        self.labels = PackedNumbers("i", data.labels)
        self.transform = build_transforms(config, rng)["train"] if transform is None else transform
        self._captions = _Captions(config, rng)

    def __len__(self) -> int:
        return len(self.captions)

    def image_path(self, index: int) -> str:
        return self.image_paths[index]

    def __getitem__(self, index: int) -> tuple[Tensor, str, Any, Any, Any, Any, int]:
        path = self.image_path(index)
        image = self.transform(read_image(path))
        caption, augmented = self._captions.both(self.captions[index], path)
        return image, caption, augmented, {}, {}, {}, self.labels[index]


class RetrievalTestDataset(Dataset[Any]):
    """Gallery of a val or test split; an item is `(image [3, h, w], mirrored image or {}, index)`.

    Attributes:
        text: all prepared captions, in file order.
        image: file names as stored, and `image_paths` joined to the image root.
        g_pids: person of each image.
        q_pids: person of each caption.

    Args:
        ann_file: JSON of the split.
        config: `image_root` (or `image_root_test`, which comes first), `h`, `w`, `max_words`, `icfg_rstp`, `test_hflip`.
        transform: by default the `test` transform of `build_transforms`.
        data: the annotation, if it has been read already.

    Raises:
        DatasetError: the file cannot be used, or a caption is empty.
    """

    def __init__(
        self,
        ann_file: str | os.PathLike[str],
        config: dict[str, Any],
        transform: Transform | None = None,
        *,
        data: ProcessedEval | None = None,
    ):
        root = config.get("image_root_test") or config["image_root"]
        data = load_processed_eval(ann_file, root) if data is None else data
        captions = _Captions({**config, "eda": False}, random)
        self.text = [captions.prepare(caption, f"file {os.fspath(ann_file)}") for caption in data.captions]
        self.image_paths = data.image_paths
        prefix = os.path.join(root, "")
        self.image = [path.removeprefix(prefix) for path in data.image_paths]
        self.g_pids, self.q_pids = data.g_pids, data.q_pids
        self.transform = build_transforms(config)["test"] if transform is None else transform
        self.hflip = bool(config.get("test_hflip", False))

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        image = read_image(self.image_paths[index])
        mirrored = self.transform(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) if self.hflip else {}
        return self.transform(image), mirrored, index
