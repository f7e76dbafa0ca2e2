"""Where regions come from: a human parser, SAM prompted with the parser's boxes, or masks that exist already."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dp_gen.segmentation.masks import ATR_CLASSES, ATR_COUNT, SMALLEST_SHARE, large_components, tight_box
from tbps_common.datasets import read_json
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import pixel_limit

Regions = dict[str, np.ndarray]
"""bool [h, w] of each type that the image shows."""

ClassMap = Mapping[str, Sequence[int]]


class Backend(Protocol):
    """Finds the regions of a batch of images."""

    def regions(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Regions]:
        """Regions of each image; `names` are its file names in the data set."""
        ...


class Parser:
    """A semantic-segmentation model of transformers; SegFormer trained on clothes by default.

    Args:
        name: folder, or name on the Hugging Face hub.
        types: to find.
        class_map: class numbers of each type; None takes the model's class names, or else the 18 ATR classes.
        device: torch device.

    Raises:
        InputError: the model cannot be read, or its classes are not known.
    """

    def __init__(self, name: str, types: Sequence[str], class_map: ClassMap | None, device: Any) -> None:
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        self.processor = load_part(AutoImageProcessor, name, "--parsing_model")
        self.model = load_part(AutoModelForSemanticSegmentation, name, "--parsing_model").eval().to(device)
        self.device = device
        self.class_map = class_map or self._known_classes(name)
        _require_types(self.class_map, types, name)
        highest = max(max(self.class_map[label]) for label in types)
        if highest >= self.model.config.num_labels:
            raise InputError(
                f"--class_map names class {highest}, and {name} has {self.model.config.num_labels} classes: correct it"
            )
        self.types = types

    def _known_classes(self, name: str) -> ClassMap:
        if self.model.config.num_labels == ATR_COUNT:
            return ATR_CLASSES
        raise InputError(
            f"--parsing_model {name} has {self.model.config.num_labels} classes, not the {ATR_COUNT} of ATR: say with "
            '--class_map which belong to which type, as in {"hair": [2], "uppercloth": [5, 6]}'
        )

    def class_pictures(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """Class numbers, int64 [h, w] at each image's own size."""
        import torch

        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            outputs = self.model(pixel_values=inputs["pixel_values"])
        sizes = [(image.height, image.width) for image in images]
        found = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [picture.cpu().numpy() for picture in found]

    def regions(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Regions]:
        return [_split(picture, self.class_map, self.types) for picture in self.class_pictures(images)]


class BoxPrompted:
    """SAM or SAM-HQ, prompted with one box per type; of its three masks the one it trusts most is kept.

    Boxes come from a parser, whose person also bounds the masks, or from a file `{"file": {"type": [x1, y1, x2, y2]}}`.

    Args:
        name: folder or hub name of the model.
        types: to find.
        parser: finds the boxes; None if `boxes` has them.
        boxes: half-open pixel boxes by file name and type.
        device: torch device.

    Raises:
        InputError: the model cannot be read.
    """

    def __init__(
        self,
        name: str,
        types: Sequence[str],
        parser: Parser | None,
        boxes: Mapping[str, Mapping[str, Sequence[float]]],
        device: Any,
    ) -> None:
        from transformers import AutoModelForMaskGeneration, AutoProcessor

        self.processor = load_part(AutoProcessor, name, "--sam_model")
        self.model = load_part(AutoModelForMaskGeneration, name, "--sam_model").eval().to(device)
        self.types, self.parser, self.boxes, self.device = types, parser, boxes, device

    def regions(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Regions]:
        if self.parser is None:
            return [
                self._prompted(image, {t: box for t, box in self.boxes.get(name, {}).items() if t in self.types}, None)
                for image, name in zip(images, names)
            ]
        found = []
        for image, picture in zip(images, self.parser.class_pictures(images)):
            parsed = _split(picture, self.parser.class_map, self.types)
            # Without the parser's specks: one of them at the feet would stretch the box of the hair over the person.
            large = {label: large_components(region, SMALLEST_SHARE) for label, region in parsed.items()}
            boxes = {label: box for label, region in large.items() if (box := tight_box(region)) is not None}
            found.append(self._prompted(image, boxes, picture != 0))
        return found

    def _prompted(self, image: Image.Image, boxes: Mapping[str, Sequence[float]], person: np.ndarray | None) -> Regions:
        import torch

        if not boxes:
            return {}
        prompts = [[[float(side) for side in box] for box in boxes.values()]]
        inputs = self.processor(images=image, input_boxes=prompts, return_tensors="pt").to(self.device)
        model_inputs = {name: inputs[name].float() for name in ("pixel_values", "input_boxes")}
        with torch.inference_mode():
            outputs = self.model(**model_inputs)
        (masks,) = self.processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
        )
        best = outputs.iou_scores[0].argmax(dim=-1).tolist()
        chosen = {label: masks[n, best[n]].numpy().astype(bool) for n, label in enumerate(boxes)}
        return {label: mask if person is None else mask & person for label, mask in chosen.items()}


class MaskFolder:
    """Masks that exist already: a label PNG or an `.npy` per image, under the image's name.

    Args:
        folder: holds `<image's path without its ending>.png` or `.npy`.
        types: to take.
        class_map: values of each type; None takes ATR's classes.

    Raises:
        InputError: the folder does not exist, or a type has no values.
    """

    def __init__(self, folder: Path, types: Sequence[str], class_map: ClassMap | None) -> None:
        if not folder.is_dir():
            raise InputError(f"--mask_dir {folder} is not a folder: name the folder of the masks")
        self.folder, self.types = folder, types
        self.class_map = class_map or ATR_CLASSES
        _require_types(self.class_map, types, "ATR")

    def regions(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Regions]:
        found = []
        for image, name in zip(images, names):
            path, picture = self._read(name)
            if picture.shape != (image.height, image.width):
                raise DatasetError(
                    f"the mask {path} is {picture.shape[1]} x {picture.shape[0]} pixels and its image {image.width} x "
                    f"{image.height}: make the mask again"
                )
            found.append(_split(picture, self.class_map, self.types))
        return found

    def _read(self, name: str) -> tuple[Path, np.ndarray]:
        stem = (self.folder / name).with_suffix("")
        for suffix, read in ((".png", _read_label_png), (".npy", _read_label_array)):
            path = stem.with_name(stem.name + suffix)
            if path.is_file():
                return path, read(path)
        raise DatasetError(f"{stem}.png (or .npy) does not exist: --mask_dir must hold a mask for every image")


def load_part(kind: Any, name: str, flag: str) -> Any:
    """`kind.from_pretrained(name)`; any failure becomes one sentence.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return kind.from_pretrained(name)
    except Exception as error:  # missing files, damaged weights, no network: transformers raises many kinds
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{flag} {name} cannot be loaded ({first_line}): give a folder in transformers' layout, or a hub name"
        ) from error


def read_class_map(path: str) -> ClassMap:
    """`{"type": [class, ...], ...}` from a JSON file.

    Raises:
        DatasetError: it is missing, or something else.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(classes, list) and classes and all(type(number) is int and number >= 0 for number in classes)
        for classes in content.values()
    ):
        raise DatasetError(f'--class_map {path} must hold {{"type": [class number, ...], ...}}')
    return content


def read_boxes(path: str) -> dict[str, dict[str, list[float]]]:
    """`{"file": {"type": [x1, y1, x2, y2]}}` from a JSON file.

    Raises:
        DatasetError: it is missing, or something else.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(boxes, dict) and all(_is_box(box) for box in boxes.values()) for boxes in content.values()
    ):
        raise DatasetError(f'--boxes {path} must hold {{"file": {{"type": [x1, y1, x2, y2], ...}}, ...}}')
    return content


def _is_box(box: object) -> bool:
    if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
        return False
    return 0 <= box[0] < box[2] < 1e6 and 0 <= box[1] < box[3] < 1e6


def _split(picture: np.ndarray, class_map: ClassMap, types: Sequence[str]) -> Regions:
    regions = {label: np.isin(picture, list(class_map[label])) for label in types}
    return {label: region for label, region in regions.items() if region.any()}


def _require_types(class_map: ClassMap, types: Sequence[str], what: str) -> None:
    unknown = [label for label in types if label not in class_map]
    if unknown:
        raise InputError(
            f"--types: {', '.join(unknown)} unknown; {what} has {', '.join(class_map)}: choose among them, or give "
            "--class_map"
        )


def _read_label_png(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > pixel_limit():
                raise DatasetError(f"the mask {path} says it has more than {pixel_limit():,} pixels: delete it")
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise DatasetError(f"the mask {path} is a colour picture ({image.mode}): class numbers are needed")
            return np.array(image)
    except DatasetError:
        raise
    except Exception as error:  # decoders answer damage with many kinds of exception
        raise DatasetError(f"the mask {path} cannot be read ({error}): make it again") from error


def _read_label_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # damaged headers make numpy fail with many kinds of exception
        raise DatasetError(f"the mask {path} cannot be read ({error}): make it again") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iub":
        raise DatasetError(f"the mask {path} must be a 2-D array of integers: make it again")
    return array
