"""How well pictures fit their captions and each other: CLIP (or a model of its kind), and a model that knows persons."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tbps_common.errors import DatasetError, InputError
from tbps_common.images import read_image
from tbps_common.pipeline.models import load_model

PADDING = (123, 117, 104)  # CLIP's mean colour: nothing to the model


@dataclass(frozen=True)
class PairScores:
    """Cosines of one pair.

    Attributes:
        clip_left, clip_right: half and its caption.
        identity: the two halves, by the person model (CLIP without one).
        pair_similarity: the two halves, by CLIP.
    """

    clip_left: float
    clip_right: float
    identity: float
    pair_similarity: float


class PairScorer:
    """Scores pairs with a contrastive image-text model of transformers, and perhaps a second, image-only one."""

    def __init__(self, clip: str, device: torch.device, dtype: torch.dtype, *, person_model: str | None = None) -> None:
        """Load the models.

        Args:
            clip: folder or hub name of CLIP, SigLIP or another model with `get_text_features`.
            device: where to compute.
            dtype: of the weights.
            person_model: folder or hub name of any image model; its pooled features tell persons apart.

        Raises:
            InputError: a model cannot be loaded or is of another kind.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.device = device
        self.clip = load_model("--clip", clip, AutoModel.from_pretrained).to(device, dtype).eval()
        if not (hasattr(self.clip, "get_image_features") and hasattr(self.clip, "get_text_features")):
            raise InputError(
                f"--clip {clip} is a {type(self.clip).__name__}, which does not compare pictures with texts"
            )
        self.tokenizer = load_model("--clip", clip, AutoTokenizer.from_pretrained)
        self.processor = load_model("--clip", clip, AutoImageProcessor.from_pretrained)
        self._texts: dict[str, Tensor] = {}
        self.person_model = self.person_processor = None
        if person_model is not None:
            person: Any = load_model("--person-model", person_model, AutoModel.from_pretrained)
            self.person_model = person.to(device, dtype).eval()
            self.person_processor = load_model("--person-model", person_model, AutoImageProcessor.from_pretrained)

    @torch.inference_mode()
    def score(
        self, pairs: Sequence[tuple[Path, Path]], captions: Sequence[tuple[str, str]], readers: Executor
    ) -> list[PairScores | str]:
        """Scores of each pair, or why its pictures cannot be read."""
        pictures = list(readers.map(_read, [path for pair in pairs for path in pair]))
        results: list[PairScores | str] = [
            next((side for side in pictures[2 * place : 2 * place + 2] if isinstance(side, str)), "")
            for place in range(len(pairs))
        ]
        sound = [place for place, result in enumerate(results) if not result]
        if not sound:
            return results
        halves: list[Image.Image] = [pictures[2 * place + side] for place in sound for side in (0, 1)]  # type: ignore[misc]
        images = self._image_features(self.clip, self.processor, halves, readers).unflatten(0, (-1, 2))  # [N, 2, D]
        texts = self._text_features([text for place in sound for text in captions[place]]).unflatten(0, (-1, 2))
        fit = (images * texts).sum(-1)  # [N, 2]
        similarity = identity = (images[:, 0] * images[:, 1]).sum(-1)
        if self.person_model is not None:
            persons = self._image_features(self.person_model, self.person_processor, halves, readers).unflatten(
                0, (-1, 2)
            )
            identity = (persons[:, 0] * persons[:, 1]).sum(-1)
        columns = torch.stack([fit[:, 0], fit[:, 1], identity, similarity], dim=1).cpu().tolist()
        for place, values in zip(sound, columns):
            results[place] = PairScores(*(round(value, 5) for value in values))
        return results

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit features `[N, D]`; a quadruple's captions are encoded once, however many variants there are."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            if len(self._texts) > 10_000:
                self._texts = {text: self._texts[text] for text in texts if text in self._texts}
            longest = min(self.tokenizer.model_max_length, self._positions())
            tokens = self.tokenizer(
                new, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
            ).to(self.device)
            features = _unit(_pooled(self.clip.get_text_features(**tokens)))
            self._texts |= dict(zip(new, features))
        return torch.stack([self._texts[text] for text in texts])

    def _image_features(self, model: Any, processor: Any, pictures: list[Image.Image], readers: Executor) -> Tensor:
        """Unit features `[N, D]`; pictures are padded to squares, so that no processor cuts head and feet off."""
        prepared = list(readers.map(partial(_prepared, processor), pictures))
        pixels = torch.cat(prepared).to(self.device, next(model.parameters()).dtype)
        output = (
            model.get_image_features(pixel_values=pixels) if hasattr(model, "get_image_features") else model(pixels)
        )
        return _unit(_pooled(output))

    def _positions(self) -> int:
        settings = getattr(self.clip.config, "text_config", self.clip.config)
        return int(getattr(settings, "max_position_embeddings", 77))


def square(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a square of CLIP's mean colour."""
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), PADDING)
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def _prepared(processor: Any, picture: Image.Image) -> Tensor:
    return processor(images=square(picture), return_tensors="pt")["pixel_values"]


def _read(path: Path) -> Image.Image | str:
    try:
        return read_image(path)
    except DatasetError as error:
        return str(error)


def _pooled(output: Any) -> Tensor:
    """Features `[N, D]` of whatever a model returns."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return pooled if pooled is not None else output.last_hidden_state[:, 0]


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float().flatten(1), dim=-1)
