"""Start weight `pose`: a small ViTPose that finds head, shoulders, hips, knees and ankles, for `mra-dad filter --pose_model`.

The world draws parts, not joints: where a joint is follows from the extents of the parts. Elbows and wrists do not, so their
heat maps stay empty: 13 of COCO's 17 key points are learnt.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mra.dad.filter import ANKLES, HEAD, HIPS, SHOULDERS
from tbps_common.pipeline.models import quiet_libraries
from tbps_world.pretrain.diffusion import fit
from tbps_world.pretrain.people import Shot, shots, start_people

PEOPLE, LEFT_ASIDE = 400, 50
SIZE = (64, 48)
STEPS = 300
_KNEES = (13, 14)
_SPREAD = 1.0  # of a key point in the heat map, whose cells are 4 x 4 pixels
_NEAR = 0.05  # of the picture's height: closer than this is right


def train(folder: Path, *, seed: int = 0, steps: int | None = None) -> dict[str, float]:
    """Train the model and write it in transformers' layout.

    Args:
        folder: receives it.
        seed: of everything.
        steps: updates.

    Returns:
        On persons left aside: share of the key points that are found within a twentieth of the picture's height, and the
        scores of those and of noise that is no person.
    """
    people = start_people(PEOPLE + LEFT_ASIDE)
    pixels, maps, _ = _lessons(people[LEFT_ASIDE:])
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        model, processor = _untrained()

        def loss(batch: Tensor) -> Tensor:
            part, wanted = pixels[batch], maps[batch].clone()
            blank = torch.rand(len(batch)) < 0.1  # pictures of nobody
            part = torch.where(blank[:, None, None, None], part[:, :, torch.randperm(SIZE[0])], part)
            wanted[blank] = 0
            return 100 * F.mse_loss(model(pixel_values=_normal(processor, part)).heatmaps, wanted)

        fit("pose", [model], loss, len(pixels), steps or STEPS, batch=32, rate=2e-3)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        pixels, _, points = _lessons(people[:LEFT_ASIDE])
        found, scores = _keypoints(model, processor, pixels)
        noise = torch.randint(0, 256, pixels.shape, dtype=torch.uint8)
        _, empty = _keypoints(model, processor, noise)
    known = ~points[..., 0].isnan()
    near = (found - points).norm(dim=2) < _NEAR * SIZE[0]
    return {
        "key points": float(near[known].float().mean()),
        "score": float(scores[known].mean()),
        "score of noise": float(empty.mean()),
    }


def _untrained() -> tuple[Any, Any]:
    from transformers import VitPoseConfig, VitPoseForPoseEstimation, VitPoseImageProcessor

    backbone = {
        "model_type": "vitpose_backbone",
        "image_size": SIZE,
        "patch_size": (8, 8),
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "out_indices": [3],
    }
    keypoints: dict[str, Any] = {"num_labels": 17}
    config = VitPoseConfig(backbone_config=backbone, scale_factor=2, **keypoints)
    return VitPoseForPoseEstimation(config), VitPoseImageProcessor(size={"height": SIZE[0], "width": SIZE[1]})


def _lessons(people: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures `[N, 3, 64, 48]` uint8, heat maps `[N, 17, 16, 12]`, and points `[N, 17, 2]` in pixels, NaN if unknown."""
    pixels, points = [], []
    for shot in shots(people, captions=0):
        picture = torch.from_numpy(np.ascontiguousarray(shot.drawing.picture.transpose(2, 0, 1)))
        # As ViTPose's processor does with the box of a whole tall picture: widened to the model's shape.
        height, width = picture.shape[1:]
        wide = height * SIZE[1] // SIZE[0]
        padded = F.pad(picture.float(), ((wide - width) // 2,) * 2)
        pixels.append(F.interpolate(padded[None], SIZE, mode="bilinear", antialias=True)[0].byte())
        shift, scale = torch.tensor([(wide - width) / 2, 0.0]), SIZE[0] / height
        points.append((joints(shot) + shift) * scale)
    found = torch.stack(points)
    rows, columns = (torch.arange(side // 4) * 4 + 1.5 for side in SIZE)
    x, y = found[..., 0, None, None], found[..., 1, None, None]
    square = ((columns[None, None, None] - x) ** 2 + (rows[None, None, :, None] - y) ** 2) / 16
    return torch.stack(pixels), torch.exp(-square / (2 * _SPREAD**2)).nan_to_num(0.0), found


def joints(shot: Shot) -> Tensor:
    """Key points in COCO's order, x and y in pixels of the picture, NaN where the parts do not tell: `[17, 2]`."""
    boxes = shot.drawing.seen.boxes
    points = torch.full((17, 2), float("nan"))
    if "head" in boxes:
        left, top, right, bottom = boxes["head"]
        middle, side = (left + right) / 2, (right - left) / 4
        across = (0, side, -side, 2 * side, -2 * side)  # nose, eyes and ears; the left ones are on the right
        for place, offset in zip(HEAD, across):
            points[place] = torch.tensor([middle + offset, top + (bottom - top) * (0.5 if place == 0 else 0.4)])
    if "upper" in boxes and "lower" in boxes:
        left, top, right, bottom = boxes["upper"]
        middle, reach = (left + right) / 2, (right - left) / 2
        waist = boxes["lower"][1]
        for place, sign in zip(SHOULDERS, (1, -1)):
            points[place] = torch.tensor([middle + sign * 0.7 * reach, top + 0.1 * (waist - top)])
        for place, sign in zip(HIPS, (1, -1)):
            points[place] = torch.tensor([middle + sign * 0.4 * reach, float(waist)])
    if "lower" in boxes and "shoes" in boxes:
        left, top, right, _ = boxes["shoes"]
        middle, waist = (left + right) / 2, boxes["lower"][1]
        for place, sign in zip(ANKLES, (1, -1)):
            points[place] = torch.tensor([middle + sign * (right - left) / 4, float(top)])
        for place, sign in zip(_KNEES, (1, -1)):
            points[place] = torch.tensor([middle + sign * (right - left) / 5, (waist + top) / 2])
    return points


def _normal(processor: Any, pixels: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(part).view(3, 1, 1) for part in (processor.image_mean, processor.image_std))
    return (pixels.float() / 255 - mean) / deviation


@torch.no_grad()
def _keypoints(model: Any, processor: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The highest place of every heat map, in pixels `[N, 17, 2]`, and its height `[N, 17]`."""
    maps = model(pixel_values=_normal(processor, pixels)).heatmaps
    scores, places = maps.flatten(2).max(dim=2)
    columns = maps.shape[-1]
    return torch.stack([places % columns, places // columns], dim=2) * 4 + 1.5, scores
