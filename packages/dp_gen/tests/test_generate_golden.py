"""Sampling against the reference numbers: conditions, denoising with delayed conditioning, decoding."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_gen import DiversePersonModel, decode_latents, denoise, load_checkpoint, load_tokenizer, parse_args
from dp_gen.generation.conditions import encode_prompts, make_prompt


def close(got: torch.Tensor, want: torch.Tensor, tolerance: dict[str, float]) -> None:
    """|got - want| <= atol + rtol * max|want|, as the reference numbers are given."""
    want = want.float()
    limit = tolerance["atol"] + tolerance["rtol"] * want.abs().max()
    assert got.shape == want.shape and (got.float() - want).abs().max() <= limit


def stored_cases() -> list[str]:
    """Names of the stored generation cases; one placeholder, which skips, without TBPS_GOLDEN."""
    root = os.environ.get("TBPS_GOLDEN")
    found = sorted(path.parent.name for path in Path(root, "dp_gen").glob("generate_*/case.json")) if root else []
    return found or ["golden-folder-absent"]


@pytest.mark.golden("dp_gen")
@pytest.mark.parametrize("name", stored_cases())
def test_stored_generations(name: str, golden: Callable[[str], Any]) -> None:
    case = golden(name)
    root: Path = case.folder.parent
    args = parse_args(default=True)
    vars(args).update(case.case["args"])
    args.pretrained_model_hf = str(root / args.pretrained_model_hf)
    args.image_encoder_hf = str(root / args.image_encoder_hf)
    model = DiversePersonModel.from_pretrained(args)
    load_checkpoint(model, root / case.case["weights"])
    model.eval()
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler.from_pretrained(args.pretrained_model_hf, subfolder="scheduler")
    tensors, tolerance = case.tensors(), case.case["tolerance"]
    tokenizer = load_tokenizer(args.pretrained_model_hf)
    slots = args.MAX_REFERENCE_ATTRIBUTE_NUM
    prompt = make_prompt(tokenizer, case.case["caption"], tensors["references"][0].float() / 255, slots)
    conditions = encode_prompts(model, tokenizer, [prompt], slots)
    for found, name in zip(conditions, ("cond", "text_cond", "null_cond")):
        close(found, tensors[name], tolerance)
    latents = denoise(
        model,
        scheduler,
        tensors["latents_in"],
        tensors["cond"],
        tensors["text_cond"],
        tensors["null_cond"],
        case.case["num_inference_steps"],
        case.case["guidance_scale"],
        case.case["start_merge_step"],
    )
    close(latents, tensors["latents_out"], tolerance)
    close(decode_latents(model, latents), tensors["image"], tolerance)
    close(decode_latents(model, tensors["latents_out"]), tensors["image"], tolerance)
