"""From frames to persons: a detector's boxes, in pictures and in videos."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tbps_common.errors import CheckpointError, ImageError, InputError
from tbps_common.images import pixel_limit, read_image
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file, load_state_dict_strictly
from tbps_common.run.device import choose_device

VIDEOS = tuple(".mp4 .m4v .mov .mkv .avi .webm .mpg .mpeg .ts".split())
_PERSON = 1  # of COCO, as torchvision numbers its classes

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Person:
    """A person in a frame."""

    image: Image.Image
    box: Box
    frame: int | None


@dataclass(frozen=True)
class Detector:
    """How persons are found.

    Attributes:
        find: frames -> for each the boxes `[N, 4]` (left, top, right, bottom) and scores `[N]` of persons.
        name: of the model.
        score: boxes with less are dropped.
        margin: share of its width and height by which a box grows on every side.
        smallest: boxes that are less high, in pixels, are dropped before they grow.
        fps: frames of a video that are looked at per second.
    """

    find: Callable[[Sequence[Image.Image]], list[tuple[torch.Tensor, torch.Tensor]]]
    name: str
    score: float
    margin: float
    smallest: int
    fps: float

    @property
    def settings(self) -> str:
        """What decides which persons are found."""
        values = {"model": self.name, "score": self.score, "margin": self.margin, "min": self.smallest, "fps": self.fps}
        return json.dumps(values)

    def persons(self, file: str) -> Iterator[Person]:
        """The persons of a picture or of a video's frames, best first within a frame.

        Raises:
            ImageError: the file cannot be read.
        """
        is_video = file.lower().endswith(VIDEOS)
        frames = video_frames(file, self.fps) if is_video else iter([(None, read_image(file, as_shown=True))])
        for number, frame in frames:
            boxes, scores = self.find([frame])[0]
            for place in scores.argsort(descending=True, stable=True).tolist():
                left, top, right, bottom = boxes[place].tolist()
                if scores[place] < self.score or bottom - top < self.smallest:
                    continue
                grown_x, grown_y = self.margin * (right - left), self.margin * (bottom - top)
                box = (
                    max(0, round(left - grown_x)),
                    max(0, round(top - grown_y)),
                    min(frame.width, round(right + grown_x)),
                    min(frame.height, round(bottom + grown_y)),
                )
                if box[0] < box[2] and box[1] < box[3]:
                    yield Person(frame.crop(box), box, number)


def open_detector(
    name: str, *, device: str = "auto", score: float = 0.5, margin: float = 0.05, smallest: int = 32, fps: float = 1.0
) -> Detector:
    """Open a detector.

    Args:
        name: a folder, or an id on the Hugging Face hub, of a transformers model for object detection; or
            `NAME:WEIGHTS.pth`, a detector of torchvision with 91 classes and its weights.
        device: of `--device`.
        score: as for `Detector`; so are the others.
        margin: see there.
        smallest: see there.
        fps: see there.

    Raises:
        InputError: no such model, or it knows no persons.
    """
    builder, _, weights = name.partition(":")
    if weights and not Path(name).exists():
        find = _of_torchvision(builder, weights, choose_device(device))
    else:
        find = _of_transformers(name, choose_device(device))
    return Detector(find, name, score, margin, smallest, fps)


def _of_torchvision(name: str, weights: str, device: torch.device) -> Any:
    try:
        from torchvision import models
        from torchvision.transforms.functional import to_tensor
    except ImportError as error:
        raise InputError(f"--detect {name}:{weights} needs torchvision: pip install 'tbps-common[detect]'") from error

    known = models.list_models(module=models.detection)
    if name not in known:
        raise InputError(f"--detect {name}:{weights}: torchvision has no detector {name!r}, only {', '.join(known)}")
    model = models.get_model(name, weights=None, weights_backbone=None)
    load_state_dict_strictly(model, find_state_dict(load_checkpoint_file(weights), source=weights)[0], source=weights)
    model = model.to(device).eval()

    def find(frames: Sequence[Image.Image]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.inference_mode():
            found = model([to_tensor(frame).to(device) for frame in frames])
        return [
            (one["boxes"][one["labels"] == _PERSON].cpu(), one["scores"][one["labels"] == _PERSON].cpu())
            for one in found
        ]

    return find


def _of_transformers(name: str, device: torch.device) -> Any:
    try:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
    except ImportError as error:
        raise InputError(f"--detect {name} needs transformers: pip install 'tbps-common[detect]'") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model: Any = AutoModelForObjectDetection.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"--detect {name} is no detector of transformers ({reason}): give its folder or id"
        ) from error
    labels = [number for number, label in model.config.id2label.items() if str(label).lower() == "person"]
    if not labels:
        raise InputError(f"--detect {name} knows no class 'person': give a detector trained on COCO, for example")
    model = model.to(device).eval()

    def find(frames: Sequence[Image.Image]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.inference_mode():
            outputs = model(**processor(images=list(frames), return_tensors="pt").to(device))
        sizes = [(frame.height, frame.width) for frame in frames]
        found = []
        for one in processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes):
            chosen = torch.isin(one["labels"], torch.tensor(labels, device=one["labels"].device))
            found.append((one["boxes"][chosen].cpu(), one["scores"][chosen].cpu()))
        return found

    return find


def video_frames(file: str, fps: float) -> Iterator[tuple[int, Image.Image]]:
    """Frames of a video and their numbers, `fps` a second; a number is the frame's time by the video's frame rate.

    Raises:
        ImageError: the file cannot be decoded.
        InputError: PyAV is not installed.
    """
    wanted = 0.0
    for number, seconds, frame in _decoded(file, 0):
        if seconds + 1e-6 >= wanted:
            yield number, frame()
            wanted = max(wanted + 1 / fps, seconds)


def video_frame(file: str, wanted: int) -> Image.Image:
    """One frame of a video, by its number.

    Raises:
        ImageError: the file cannot be decoded, or has no such frame.
    """
    for number, _, frame in _decoded(file, wanted):
        if number >= wanted:
            return frame()
    raise ImageError(f"The video {file} has no frame {wanted}.")


def _decoded(file: str, first: int) -> Iterator[tuple[int, float, Callable[[], Image.Image]]]:
    """Number, seconds and picture of each frame from the last key frame before `first` on."""
    try:
        import av
    except ImportError as error:
        raise InputError(f"{file} is a video, which needs PyAV: pip install 'tbps-common[video]'") from error
    try:
        # A playlist must not lead to other places than files.
        with av.open(file, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise ImageError(f"The file {file} has no video stream.")
            stream = container.streams.video[0]
            if stream.width * stream.height > pixel_limit():
                raise ImageError(f"The video {file} has frames of more than {pixel_limit():,} pixels.")
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            start = float((stream.start_time or 0) * (stream.time_base or 0))
            if first:
                container.seek(int((start + first / rate) * av.time_base))
            for place, frame in enumerate(container.decode(stream)):
                seconds = place / rate if frame.time is None else frame.time - start
                yield round(seconds * rate), seconds, lambda frame=frame: _upright(frame)
    except av.FFmpegError as error:
        raise ImageError(f"The video {file} cannot be read: {error.strerror}.") from error


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
