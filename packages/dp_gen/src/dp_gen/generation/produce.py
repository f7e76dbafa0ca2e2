"""From tasks to images: batches through the model, each result independent of its neighbours."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dp_gen import IMAGE_TOKEN
from dp_gen.data.dataset import require_inside
from dp_gen.data.folder import TrainingFolder
from dp_gen.data.transforms import attribute_transforms, cut_attribute
from dp_gen.generation.conditions import encode_prompts, make_prompt
from dp_gen.generation.geometry import Square, at_latent_size, dilate, feather, paste, to_square
from dp_gen.generation.references import reference_tensor
from dp_gen.generation.sampling import decode_latents, denoise, edit
from dp_gen.generation.tasks import EditTask, NewTask
from dp_gen.model.captions import encode_with_image_tokens, insert_image_tokens
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import find_damage

_FEATHER = 0.02  # of the square's side
_PRIOR_LATENTS = 4  # channels of the VAE's latents


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance.
        start_merge_step: references enter after this call; -1 from the first.
        negative: caption to steer away from.
        height: of new images, in pixels; None takes the model's resolution.
        width: likewise.
        strength: share of the steps that an edit makes.
        dilation: share of the square's side by which edited regions grow.
        whole_person: edit everything that is not background.
    """

    steps: int = 50
    guidance: float = 5.0
    start_merge_step: int = 0
    negative: str = ""
    height: int | None = None
    width: int | None = None
    strength: float = 0.8
    dilation: float = 0.04
    whole_person: bool = False


class Producer:
    """Makes the images of tasks with one model.

    Args:
        pipeline: a `DiversePersonPipeline`, on its device.
        sampling: how.
    """

    def __init__(self, pipeline: Any, sampling: Sampling | None = None) -> None:
        self.pipeline, self.sampling = pipeline, sampling or Sampling()
        self.model, self.tokenizer = pipeline.model, pipeline.tokenizer
        self.resolution = int(pipeline.settings["resolution"])
        self.slots = int(pipeline.settings["max_reference_attribute_num"])

    def check(self, tasks: Sequence[NewTask]) -> None:
        """Whether the tokeniser finds a word for every image token of the descriptions.

        Raises:
            InputError: it does not, or there are more than the model takes.
        """
        for description, count in {(task.description, len(task.references)) for task in tasks}:
            make_prompt(self.tokenizer, description, torch.zeros(count, 3, 1, 1), self.slots)

    def new(self, tasks: Sequence[NewTask]) -> list[Image.Image]:
        """One image per task.

        Raises:
            InputError: tokens and references do not fit.
            DatasetError: a reference cannot be read.
        """
        prompts = [
            make_prompt(self.tokenizer, task.description, self._references(task.references), self.slots)
            for task in tasks
        ]
        conditions = encode_prompts(self.model, self.tokenizer, prompts, self.slots, self.sampling.negative)
        height, width = (side or self.resolution for side in (self.sampling.height, self.sampling.width))
        noise = self._noise(tasks, height // 8, width // 8)
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(self.sampling.steps)  # some schedulers know their sigma only then
        latents = denoise(
            self.model,
            scheduler,
            noise * scheduler.init_noise_sigma,
            *conditions,
            self.sampling.steps,
            self.sampling.guidance,
            self.sampling.start_merge_step,
        )
        return [_to_picture((image * 255).round().to(torch.uint8)) for image in self._decoded(latents, tasks)]

    def fitted(self, task: EditTask) -> EditTask | None:
        """The task without the segments whose phrase the text encoder cannot see (77 tokens, say); None if none is left.

        A phrase that is cut off loses its reference in the training too.
        """
        segments = list(task.segments)
        while segments:
            _, mask = encode_with_image_tokens(self.tokenizer, insert_image_tokens(task.caption, segments))
            if int(mask.sum()) == len(segments):
                break
            segments.pop()
        labels = {segment["label"] for segment in segments}
        edited = {label: reference for label, reference in task.edited.items() if label in labels}
        return replace(task, segments=tuple(segments), edited=edited) if edited else None

    def edits(self, tasks: Sequence[EditTask], folder: TrainingFolder) -> list[Image.Image]:
        """One edited image per task of `fitted`, at its original's size.

        Raises:
            DatasetError: a sample or reference cannot be read.
        """
        for task in tasks:
            damage = find_damage(folder.image_path(task.sample))
            if damage is not None:
                raise DatasetError(f"the image {folder.image_path(task.sample)} is damaged ({damage}): replace it")
        loaded = [folder.load(task.index) for task in tasks]
        prompts, squares, regions = [], [], []
        for task, (image, _, mask, _) in zip(tasks, loaded):
            square, seg = to_square(image, mask, self.resolution)
            squares.append(square)
            regions.append(self._region(task, seg))
            text = insert_image_tokens(task.caption, task.segments)
            prompts.append(make_prompt(self.tokenizer, text, self._own_references(task, image, mask), self.slots))
        conditions = encode_prompts(self.model, self.tokenizer, prompts, self.slots, self.sampling.negative)
        weights = next(self.model.unet.parameters())
        pixels = torch.stack(squares).to(weights.device)
        side = self.resolution // 8
        still = torch.zeros(len(tasks), _PRIOR_LATENTS, side, side, device=weights.device)
        with torch.no_grad():
            original = self.model.encode_latents(pixels, noise=still.to(weights.dtype)).float()
        latents = edit(
            self.model,
            self.pipeline.scheduler,
            original,
            torch.stack([at_latent_size(region) for region in regions]).to(original),
            self._noise(tasks, side, side),
            *conditions,
            self.sampling.steps,
            self.sampling.guidance,
            self.sampling.start_merge_step,
            self.sampling.strength,
        )
        results = []
        for (image, _, _, _), region, picture in zip(loaded, regions, self._decoded(latents, tasks)):
            place = Square(image.shape[1], image.shape[2], self.resolution)
            results.append(_to_picture(paste(image, picture, feather(region, _FEATHER), place)))
        return results

    def _decoded(self, latents: Tensor, tasks: Sequence[NewTask | EditTask]) -> Tensor:
        """Images of latents: float [B, 3, H, W] in [0, 1], on the CPU.

        Raises:
            InputError: an image is not finite, which would be saved as black.
        """
        images = decode_latents(self.model, latents).cpu()
        broken = [task.name for task, image in zip(tasks, images) if not bool(torch.isfinite(image).all())]
        if broken:
            raise InputError(
                f"the model's numbers for {broken[0]} are not finite: the precision is too low (--mixed_precision bf16 or "
                "no), or the training diverged (choose an earlier checkpoint)"
            )
        return images

    def _references(self, files: Sequence[Path]) -> Tensor:
        if not files:
            return torch.zeros(0, 3, self.resolution, self.resolution)
        return torch.stack([reference_tensor(file, self.resolution) for file in files])

    def _own_references(self, task: EditTask, image: Tensor, mask: Tensor) -> Tensor:
        """The new image for edited segments, the image's own cut-out, on noise as in training, for the others."""
        generator = torch.Generator().manual_seed(task.seed)
        background = torch.randint(0, 255, image.shape, dtype=torch.uint8, generator=generator)
        transform = attribute_transforms(self.resolution)
        references = []
        for segment in task.segments:
            new = task.edited.get(segment["label"])
            if new is not None:
                references.append(reference_tensor(new.file, self.resolution))
            else:
                require_inside(segment["bbox"], image, task.sample)
                cut = cut_attribute(image, background, mask, segment["id"], segment["bbox"])
                references.append(transform(cut))
        return torch.stack(references)

    def _region(self, task: EditTask, seg: Tensor) -> Tensor:
        """Where the square may change: float [R, R] of 0 and 1.

        Raises:
            DatasetError: it shows nothing of an edited label: the result would be the original under another caption.
        """
        for label in task.edited:
            ids = [segment["id"] for segment in task.segments if segment["label"] == label]
            if not bool(torch.isin(seg, torch.tensor(ids, dtype=seg.dtype)).any()):
                raise DatasetError(
                    f"the mask of sample {task.sample} shows nothing of its segment {label!r}, so it cannot be edited: "
                    "take the sample out of the id file (python -m dp_gen.data names all such)"
                )
        if self.sampling.whole_person:
            chosen = seg != 0
        else:
            ids = [segment["id"] for segment in task.segments if segment["label"] in task.edited]
            chosen = torch.isin(seg, torch.tensor(ids, dtype=seg.dtype))
        return dilate(chosen.float(), self.sampling.dilation)

    def _noise(self, tasks: Sequence[NewTask | EditTask], height: int, width: int) -> Tensor:
        """One generator per image: its noise depends on nothing but its seed. Float32, as the latents are."""
        drawn = [
            torch.randn(_PRIOR_LATENTS, height, width, generator=torch.Generator().manual_seed(task.seed))
            for task in tasks
        ]
        return torch.stack(drawn).to(next(self.model.unet.parameters()).device)


def _to_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def new_row(task: NewTask) -> dict[str, Any]:
    """The manifest's line of a new person."""
    parts = task.description.split(IMAGE_TOKEN)
    return {
        "file": task.name,
        "kind": "new",
        "description_number": task.number,
        "seed": task.seed,
        "references": [str(file) for file in task.references],
        "caption": "".join(parts),
        "base_description": "".join(parts),
        "reference_attribute_list": [_last_phrase(part) for part in parts[:-1]],
    }


def edit_row(task: EditTask, person: Any) -> dict[str, Any]:
    """The manifest's line of an edit."""
    return {
        "file": task.name,
        "kind": "edit",
        "source": task.sample,
        "person": person,
        "labels": list(task.edited),
        "seed": task.seed,
        "references": [str(reference.file) for reference in task.edited.values()],
        "caption": task.caption,
        "base_description": task.original,
        "reference_attribute_list": [reference.phrase for reference in task.edited.values()],
    }


def _last_phrase(text: str) -> str:
    """The noun phrase right before an image token, as far as words tell."""
    words = text.replace(",", " , ").split()
    stops = {"with", "in", "and", "wearing", "wears", "is", "has", "on", ","}
    start = next((place + 1 for place in range(len(words) - 1, -1, -1) if words[place].lower() in stops), 0)
    return " ".join(words[start:]) or text.strip()


def read_persons(root: Path) -> Mapping[str, Any]:
    """Person id of every sample, from the folder's meta.jsonl if it has one."""
    path = root / "meta.jsonl"
    if not path.is_file():
        return {}
    persons = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            persons[str(row["id"])] = row.get("person")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}): run segment.py again") from error
    return persons
