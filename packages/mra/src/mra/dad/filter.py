"""`mra-dad filter`: drop greyscale pictures and malformed persons, and say what share that is."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mra.dad.work import (
    FILTERED,
    GENERATED,
    Process,
    manifests,
    read_input,
    require_images,
    require_model,
    run,
    with_pictures,
)
from tbps_common.pipeline.stages import Dropped, Record

PUBLISHED_SHARE = 10.63
"""Of 1,362,520 pictures, in percent (paper)."""

NO_POSE_MODEL = "none"


def main(args: argparse.Namespace) -> int:
    """Run the stage; returns the exit status.

    Raises:
        InputError: the stage before is not finished, pictures are missing, or the pose model cannot be used.
    """
    if args.pose_model != NO_POSE_MODEL:
        require_model("--pose_model", args.pose_model)
    records, source = read_input(Path(args.work), GENERATED)
    records = args.shard.of(records)  # the others need not stay in memory
    require_images(args, records)
    names = ("min_chroma", "min_chroma_spread", "pose_model", "keypoint_score", "min_keypoints", "min_extent")
    settings = {**{name: getattr(args, name) for name in (*names, "any_order", "precision")}, "input": source}
    status = run(args, FILTERED, records, settings, lambda: _build(args))
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


def _build(args: argparse.Namespace) -> Process:
    from mra.dad.quality import chroma, judge_colour, judge_pose
    from tbps_common.run.device import choose_device

    estimate = None if args.pose_model == NO_POSE_MODEL else pose_estimator(args, choose_device(args.device))

    def judge(batch: list[Record], pictures: list[Any]) -> Sequence[Record | Dropped]:
        results: list[Record | Dropped | None] = []
        colourful: list[tuple[int, Any]] = []
        for place, picture in enumerate(pictures):
            measured = chroma(picture)
            reason = judge_colour(measured, args.min_chroma, args.min_chroma_spread)
            values = {"chroma": round(measured.mean, 2), "chroma_spread": round(measured.spread, 2)}
            results.append(Dropped(reason, values) if reason else None)
            if reason is None:
                colourful.append((place, picture))
        if estimate is None or not colourful:
            return [record if result is None else result for record, result in zip(batch, results)]
        poses = estimate([picture for _, picture in colourful])
        for (place, picture), (keypoints, scores) in zip(colourful, poses):
            reason = judge_pose(
                keypoints,
                scores,
                picture.height,
                min_score=args.keypoint_score,
                min_count=args.min_keypoints,
                min_extent=args.min_extent,
                any_order=args.any_order,
            )
            if reason:
                count = int((scores >= args.keypoint_score).sum())
                results[place] = Dropped(reason, {"keypoints": count})
        return [record if result is None else result for record, result in zip(batch, results)]

    return with_pictures(args.images, judge)


def pose_estimator(args: argparse.Namespace, device: Any) -> Callable[[list[Any]], list[tuple[Any, Any]]]:
    """A function from pictures to (key points `[17, 2]` in pixels, scores `[17]`) of the person that fills each.

    Raises:
        InputError: the model cannot be loaded, or is none of persons.
    """
    import torch
    from transformers import VitPoseForPoseEstimation, VitPoseImageProcessor

    from mra.dad.models import choose_dtype, load, quiet
    from tbps_common.errors import InputError

    name = args.pose_model
    dtype = choose_dtype(args.precision, device, on_gpu="fp32")
    with quiet():
        processor: Any = load("--pose_model", name, lambda: VitPoseImageProcessor.from_pretrained(name))
        model: Any = load(
            "--pose_model",
            name,
            lambda: VitPoseForPoseEstimation.from_pretrained(name, dtype=dtype, use_safetensors=True),
        )
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
