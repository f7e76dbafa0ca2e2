"""`fafa-syncpr cost`: what the stages cost in GPU-hours and disk space, by arithmetic on stated assumptions."""

import argparse
from dataclasses import dataclass

from tbps_common.run.arguments import number, whole_number

DESCRIPTION = """\
Compute GPU-hours and disk space of the stages. Every assumption is a flag: put in what you measure (each stage prints its
items per second, and its manifest holds the seconds).

  fafa-syncpr cost                                        the paper's sizes
  fafa-syncpr cost --quadruples 10000 --picture-tflops 2100 --gpu-tflops 150

A picture of FLUX.1-dev of 384 x 384 takes 28 steps of 576 picture and 512 text tokens. A token passes 6.5 of the 12 billion
parameters (the others are the other stream's, or work once per picture): 2 x 6.46e9 x 1,088 = 14.1 Tflop per step, and 0.8
for the attention; 28 x 14.9 = 417 Tflop, and 6 for the text encoder and the auto-encoder: about 425.
"""


@dataclass(frozen=True)
class Line:
    """One stage's cost; the arithmetic is shown beside the result."""

    stage: str
    arithmetic: str
    hours: float


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    size = parser.add_argument_group("size (the paper's; 10 pictures per quadruple are inferred)")
    size.add_argument("--quadruples", type=whole_number(1), default=140_500, help="texts")
    size.add_argument("--variants", type=whole_number(1), default=10, help="pictures per quadruple")
    size.add_argument("--kept", type=number(0), default=1_150_000 / 2_810_000, help="share of pairs that is kept")
    texts = parser.add_argument_group("texts (assumed)")
    texts.add_argument("--per-request", type=whole_number(1), default=5, help="quadruples per request")
    texts.add_argument(
        "--answer-tokens", type=whole_number(1), default=950, help="tokens per answer: 190 per quadruple"
    )
    texts.add_argument(
        "--tokens-per-second", type=number(0, above=True), default=2000.0, help="of a 72B model, many requests at once"
    )
    texts.add_argument("--text-gpus", type=whole_number(1), default=4, help="GPUs that hold the chat model")
    pictures = parser.add_argument_group("pictures (assumed)")
    pictures.add_argument(
        "--picture-tflops", type=number(0, above=True), default=425.0, help="operations of one picture"
    )
    pictures.add_argument(
        "--gpu-tflops",
        type=number(0, above=True),
        default=400.0,
        help="reached per second: 40 %% of an H100's peak in bf16",
    )
    pictures.add_argument("--lora-steps", type=whole_number(0), default=2000, help="of the LoRA's training")
    pictures.add_argument("--lora-batch", type=whole_number(1), default=4, help="pictures per step")
    filters = parser.add_argument_group("filters (assumed)")
    filters.add_argument("--clip-gflops", type=number(0, above=True), default=162.0, help="one half in CLIP ViT-L/14")
    filters.add_argument(
        "--asked", type=number(0), default=0.6, help="share of pairs that the seeing model is asked about"
    )
    filters.add_argument(
        "--answers-per-second", type=number(0, above=True), default=15.0, help="of a 7B model that sees"
    )
    disk = parser.add_argument_group("disk (assumed)")
    disk.add_argument(
        "--picture-kb", type=number(0), default=250.0, help="one whole picture as PNG; its halves take as much"
    )


def lines(flags: argparse.Namespace) -> list[Line]:
    """The stages' costs."""
    pictures = flags.quadruples * flags.variants
    requests = -(-flags.quadruples // flags.per_request)
    step = flags.picture_tflops / 28  # one forward pass
    clip = flags.gpu_tflops * 1000
    return [
        Line(
            "quadruples",
            f"{requests:,} requests x {flags.answer_tokens} tokens / {flags.tokens_per_second:g} per s "
            f"x {flags.text_gpus} GPUs",
            requests * flags.answer_tokens / flags.tokens_per_second * flags.text_gpus / 3600,
        ),
        Line(
            "lora",
            f"{flags.lora_steps:,} steps x {flags.lora_batch} pictures x 3 passes x {step:.1f} Tflop "
            f"/ {flags.gpu_tflops:g} Tflop per s",
            flags.lora_steps * flags.lora_batch * 3 * step / flags.gpu_tflops / 3600,
        ),
        Line(
            "images",
            f"{pictures:,} pictures x {flags.picture_tflops:g} Tflop / {flags.gpu_tflops:g} Tflop per s",
            pictures * flags.picture_tflops / flags.gpu_tflops / 3600,
        ),
        Line(
            "filter, CLIP",
            f"{2 * pictures:,} halves x {flags.clip_gflops:g} Gflop / {flags.gpu_tflops:g} Tflop per s",
            2 * pictures * flags.clip_gflops / clip / 3600,
        ),
        Line(
            "filter, VLM",
            f"{pictures:,} pairs x {flags.asked:g} / {flags.answers_per_second:g} per s",
            pictures * flags.asked / flags.answers_per_second / 3600,
        ),
    ]


def run(flags: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    table = lines(flags)
    pictures = flags.quadruples * flags.variants
    for line in table:
        print(f"{line.stage:14}{line.hours:>9.1f} GPU-hours   {line.arithmetic}")
    print(f"{'together':14}{sum(line.hours for line in table):>9.1f} GPU-hours")
    size = pictures * flags.picture_kb * 1000
    print(
        f"{pictures:,} pictures: {2 * size / 1e9:,.0f} GB with the whole pictures, {size / 1e9:,.0f} GB with --halves-only"
    )
    print(
        f"{2 * pictures:,} triplets in both directions, of which {flags.kept:.0%} kept are {2 * pictures * flags.kept:,.0f}"
    )
    return 0
