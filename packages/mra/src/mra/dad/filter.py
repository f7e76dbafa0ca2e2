"""`mra-dad filter`: drop greyscale pictures and malformed persons, and say what share that is.

The paper removes "greyscale-like images by statistics of channel differences" and "malformed persons by key points"
without stating its statistics; those below are ours.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mra.dad.records import FILTERED, GENERATED, MODEL_FILES, PictureProcess, manifests, run_on_pictures
from tbps_common.errors import InputError
from tbps_common.pipeline import Dropped, Record
from tbps_common.pipeline.models import choose_dtype, load_model, require_model
from tbps_common.run.device import choose_device

PUBLISHED_SHARE = 10.63
"""Of 1,362,520 pictures, in percent (paper)."""

NO_POSE_MODEL = "none"
_SETTINGS = (
    "min_chroma min_chroma_spread pose_model keypoint_score min_keypoints min_extent any_order precision"
).split()

# Key points of COCO, as pose models number them.
HEAD = (0, 1, 2, 3, 4)
SHOULDERS = (5, 6)
HIPS = (11, 12)
ANKLES = (15, 16)

GREYSCALE = "greyscale"
FEW_KEYPOINTS = "few key points"
SMALL_PERSON = "key points span too little"
WRONG_ORDER = "head, shoulders, hips and ankles out of order"


def main(args: argparse.Namespace) -> int:
    """Run the stage; returns the exit status.

    Raises:
        InputError: the stage before is not finished, pictures are missing, or the pose model cannot be used.
    """
    if args.pose_model != NO_POSE_MODEL:
        require_model("--pose_model", args.pose_model, *MODEL_FILES)
    status = run_on_pictures(args, GENERATED, FILTERED, _build, settings=_SETTINGS)
    print(share_sentence(Path(args.work)))
    return status


def share_sentence(work: Path) -> str:
    """What share of the pictures the filter removed, in all shards that have come so far, beside the published one."""
    removed = judged = 0
    for manifest in manifests(work, FILTERED):
        dropped = sum(manifest.get("dropped", {}).values())
        removed += dropped
        judged += dropped + manifest.get("kept", 0)
    share = 100 * removed / judged if judged else 0.0
    return f"{removed} of {judged} pictures removed: {share:.2f} % (SDA: {PUBLISHED_SHARE} %)"


def _build(args: argparse.Namespace) -> PictureProcess:
    estimate = None if args.pose_model == NO_POSE_MODEL else pose_estimator(args, choose_device(args.device))

    def judge(batch: list[Record], pictures: list[Any]) -> Sequence[Record | Dropped]:
        results: list[Record | Dropped] = list(batch)
        colourful: list[int] = []
        for place, picture in enumerate(pictures):
            measured = chroma(picture)
            reason = judge_colour(measured, args.min_chroma, args.min_chroma_spread)
            if reason is None:
                colourful.append(place)
            else:
                values = {"chroma": round(measured.mean, 2), "chroma_spread": round(measured.spread, 2)}
                results[place] = Dropped(reason, values)
        if estimate is None or not colourful:
            return results
        poses = estimate([pictures[place] for place in colourful])
        for place, (keypoints, scores) in zip(colourful, poses):
            reason = judge_pose(
                keypoints,
                scores,
                pictures[place].height,
                min_score=args.keypoint_score,
                min_count=args.min_keypoints,
                min_extent=args.min_extent,
                any_order=args.any_order,
            )
            if reason:
                count = int((scores >= args.keypoint_score).sum())
                results[place] = Dropped(reason, {"keypoints": count})
        return results

    return judge


def pose_estimator(args: argparse.Namespace, device: torch.device) -> Callable[[list[Any]], list[tuple[Any, Any]]]:
    """A function from pictures to (key points `[17, 2]` in pixels, scores `[17]`) of the person that fills each.

    Raises:
        InputError: the model cannot be loaded, or does not find the key points of persons.
    """
    from transformers import VitPoseForPoseEstimation, VitPoseImageProcessor

    name = args.pose_model
    dtype = choose_dtype(args.precision, device, on_gpu="fp32")
    processor: Any = load_model("--pose_model", name, VitPoseImageProcessor.from_pretrained)
    loader = VitPoseForPoseEstimation.from_pretrained
    model: Any = load_model("--pose_model", name, loader, dtype=dtype, use_safetensors=True)
    if model.config.num_labels != 17:
        raise InputError(
            f"--pose_model {name} finds {model.config.num_labels} key points: give one of COCO's 17 key points"
        )
    model.to(device).eval()
    experts = getattr(model.config.backbone_config, "num_experts", 1)

    @torch.inference_mode()
    def estimate(pictures: list[Any]) -> list[tuple[Any, Any]]:
        boxes = [[[0.0, 0.0, float(picture.width), float(picture.height)]] for picture in pictures]
        inputs = processor(pictures, boxes=boxes, return_tensors="pt")
        more = {}
        if experts > 1:  # ViTPose++: expert 0 is COCO's
            more["dataset_index"] = torch.zeros(len(pictures), dtype=torch.int64, device=device)
        outputs = model(pixel_values=inputs["pixel_values"].to(device, dtype), **more)
        outputs.heatmaps = outputs.heatmaps.float().cpu()
        found = processor.post_process_pose_estimation(outputs, boxes=boxes)
        return [(people[0]["keypoints"].numpy(), people[0]["scores"].numpy()) for people in found]

    return estimate


@dataclass(frozen=True)
class Chroma:
    """How colourful a picture is, 0 (greyscale) to 255.

    Attributes:
        mean: of max(R, G, B) - min(R, G, B) over the pixels.
        spread: the larger standard deviation of R - G and G - B over the pixels. Toned greyscale has colour
            everywhere, but nearly the same.
    """

    mean: float
    spread: float


def chroma(picture: Image.Image) -> Chroma:
    """Measure an RGB picture; JPEG's coarse colours are averaged out over 4 x 4 pixels where there are that many."""
    small = picture.reduce(4) if min(picture.size) >= 64 else picture
    pixels = np.asarray(small, dtype=np.int16).reshape(-1, 3)  # (pixels, RGB)
    difference = pixels.max(axis=1) - pixels.min(axis=1)
    red_green, green_blue = pixels[:, 0] - pixels[:, 1], pixels[:, 1] - pixels[:, 2]
    return Chroma(float(difference.mean()), float(max(red_green.std(), green_blue.std())))


def judge_colour(measured: Chroma, min_mean: float, min_spread: float) -> str | None:
    """Why a picture is dropped for its colours, or None."""
    return GREYSCALE if measured.mean < min_mean or measured.spread < min_spread else None


def judge_pose(
    keypoints: np.ndarray,
    scores: np.ndarray,
    height: int,
    *,
    min_score: float,
    min_count: int,
    min_extent: float,
    any_order: bool = False,
) -> str | None:
    """Why a person counts as malformed, or None.

    Args:
        keypoints: `[17, 2]`, x and y in pixels, in COCO's order.
        scores: `[17]`, confidence of each.
        height: of the picture, in pixels.
        min_score: from which a key point counts.
        min_count: fewest that count.
        min_extent: least vertical extent of those that count, as a share of the picture.
        any_order: do not require head above shoulders above hips above ankles. (Parts without a key point that counts
            are left out.)
    """
    sure = scores >= min_score
    if int(sure.sum()) < min_count:
        return FEW_KEYPOINTS
    if not sure.any():
        return None
    y = keypoints[:, 1]
    if float(y[sure].max() - y[sure].min()) < min_extent * height:
        return SMALL_PERSON
    parts = [[part for part in group if sure[part]] for group in (HEAD, SHOULDERS, HIPS, ANKLES)]
    levels = [float(y[part].mean()) for part in parts if part]
    if not any_order and levels != sorted(levels):
        return WRONG_ORDER
    return None
