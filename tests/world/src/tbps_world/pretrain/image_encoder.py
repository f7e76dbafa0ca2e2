"""Start weight `image_encoder`: a CLIP whose image tower knows clothes, for DP's `--image_encoder_hf`.

As wide as the text features of `diffusion`. The tower was taught the attributes of whole persons; what cut-outs of garments
look like it has not seen, as the real one. The text tower, which DP does not read, is random.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_gen.model.diverse_person import CLIP_MEAN, CLIP_STD
from tbps_common.pipeline.models import quiet_libraries
from tbps_world.pretrain.diffusion import TEXT_WIDTH, fit
from tbps_world.pretrain.people import shots, start_people
from tbps_world.synth.attributes import ATTRIBUTES, VALUES

PEOPLE, LEFT_ASIDE, VIEWS = 600, 50, 2
SIDE, STEPS = 32, 500
_HIDDEN = -100  # what a picture does not show


def train(folder: Path, *, seed: int = 0, steps: int | None = None) -> dict[str, float]:
    """Train the tower and write the model in transformers' layout.

    Args:
        folder: receives it.
        seed: of everything.
        steps: updates.

    Returns:
        Share of the visible attributes that it names on persons left aside, and of the garments' colours.
    """
    people = start_people(PEOPLE + LEFT_ASIDE)
    pixels, codes = _lessons(people[LEFT_ASIDE:])
    sizes = [len(values) for values in VALUES.values()]
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        model, heads = _untrained(), nn.Linear(TEXT_WIDTH, sum(sizes))

        def loss(batch: Tensor) -> Tensor:
            part = pixels[batch]
            found = heads(_features(model, part.flip(3) if torch.rand(()) < 0.5 else part)).split(sizes, dim=1)
            parts = [F.cross_entropy(answer, code) for answer, code in zip(found, codes[batch].unbind(1))]
            return torch.stack([part.nan_to_num() for part in parts]).mean()

        fit("image encoder", [model, heads], loss, len(pixels), steps or STEPS, batch=32, rate=2e-3)
        model.save_pretrained(folder)
    pixels, codes = _lessons(people[:LEFT_ASIDE])
    with torch.no_grad():
        found = torch.stack([part.argmax(dim=1) for part in heads(_features(model, pixels)).split(sizes, dim=1)], dim=1)
    right, colours = found == codes, [ATTRIBUTES.index(name) for name in ("upper_colour", "lower_colour")]
    return {
        "attributes": float(right[codes != _HIDDEN].float().mean()),
        "garments' colours": float(right[:, colours].float().mean()),
    }


def _lessons(people: Any) -> tuple[Tensor, Tensor]:
    """Pictures squashed to a square `[N, 3, 32, 32]` uint8, and what they show."""
    pixels, codes = [], []
    for shot in shots(people, views=VIEWS, captions=0):
        picture = torch.from_numpy(np.ascontiguousarray(shot.drawing.picture.transpose(2, 0, 1)))
        pixels.append(F.interpolate(picture[None].float(), (SIDE, SIDE), mode="bilinear", antialias=True)[0].byte())
        seen = shot.drawing.seen.visible
        shown = zip(ATTRIBUTES, shot.person.codes())
        codes.append(torch.tensor([code if name in seen else _HIDDEN for name, code in shown]))
    return torch.stack(pixels), torch.stack(codes)


def _features(model: Any, pixels: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    pooled = model.vision_model(pixel_values=(pixels.float() / 255 - mean) / deviation).pooler_output
    return model.visual_projection(pooled)


def _untrained() -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=4,
        projection_dim=TEXT_WIDTH,
    )
    text = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=2,
    )
    return CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=TEXT_WIDTH))
