"""`fafa-syncpr cost`: what the stages cost in GPU-hours and disk space, by arithmetic on stated assumptions."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One stage's cost; the arithmetic is shown beside the result."""

    stage: str
    arithmetic: str
    hours: float


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


def main(flags: argparse.Namespace) -> int:
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
