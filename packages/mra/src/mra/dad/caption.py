"""`mra-dad caption`: one description per picture, by BLIP-2."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from mra.dad.records import CAPTIONED, FILTERED, MODEL_FILES, PictureProcess, run_on_pictures
from tbps_common.pipeline import Dropped, Record
from tbps_common.pipeline.models import choose_dtype, load_model, require_model
from tbps_common.run.device import choose_device

NO_WORDS = "empty caption"


def main(args: argparse.Namespace) -> int:
    """Run the stage; returns the exit status.

    Raises:
        InputError: the stage before is not finished, pictures are missing, or the model cannot be used.
    """
    require_model("--model", args.model, *MODEL_FILES)
    settings = ("model", "prompt", "max_tokens", "beams", "precision")
    return run_on_pictures(args, FILTERED, CAPTIONED, _build, settings=settings)


def _build(args: argparse.Namespace) -> PictureProcess:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device, on_gpu="fp16")
    processor = load_model("--model", args.model, AutoProcessor.from_pretrained)
    loader = AutoModelForImageTextToText.from_pretrained
    model: Any = load_model("--model", args.model, loader, dtype=dtype, use_safetensors=True)
    model.to(device).eval()

    @torch.inference_mode()
    def describe(batch: list[Record], pictures: list[Any]) -> Sequence[Record | Dropped]:
        inputs = processor(images=pictures, text=[args.prompt] * len(batch), return_tensors="pt").to(device, dtype)
        tokens = model.generate(**inputs, max_new_tokens=args.max_tokens, num_beams=args.beams, do_sample=False)
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        return [
            {**record, "caption": caption} if caption else Dropped(NO_WORDS)
            for record, caption in zip(batch, (clean(text, args.prompt) for text in texts))
        ]

    return describe


def clean(text: str, prompt: str) -> str:
    """A generated text on one line, without the prompt that some language models repeat."""
    words = " ".join(text.split())
    return words.removeprefix(" ".join(prompt.split())).strip()
