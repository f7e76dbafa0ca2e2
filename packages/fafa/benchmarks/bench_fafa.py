"""`python packages/fafa/benchmarks/bench_fafa.py`: a training step and an evaluation, this package against the direct forms of the method.

The direct forms broadcast all pairs of tokens for FD's cosine and all queries for the similarities, run the ViT once for
references and once for targets, keep Q x G x T similarities, and compute AP column by column and INP query by query
(see `bench_fafa_direct`). Both forms take turns in one process on the same weights and data; the fastest of the repeats
counts, and the command fails if their results differ.

    python packages/fafa/benchmarks/bench_fafa.py                                  # a small model on the CPU
    python packages/fafa/benchmarks/bench_fafa.py --full-size --device cuda        # ViT-g, batch 256: step, images/s, MFU, memory
"""

import argparse
import platform
import sys
from typing import Any

from tbps_common.run.command import command

SIZES = {
    "batch_size": (16, "triplets in a training step (256 with --full-size)"),
    "image_size": (112, "image side, a multiple of 14"),
    "vit_width": (192, "width of the ViT, a multiple of 64"),
    "vit_depth": (4, "blocks of the ViT"),
    "qformer_width": (128, "width of the Q-Former, a multiple of 64"),
    "qformer_depth": (4, "layers of the Q-Former"),
    "query_tokens": (32, "query tokens"),
    "embed_dim": (256, "width of the compared features"),
    "queries": (200, "queries of the evaluation (2202 with --full-size)"),
    "gallery": (800, "images of the evaluation (20510 with --full-size)"),
    "repeats": (3, "timed repeats of each form; the fastest counts"),
    "threads": (1, "CPU threads"),
}
FULL_SIZE = {"batch_size": 256, "queries": 2202, "gallery": 20510}


def build_parser() -> argparse.ArgumentParser:
    """The flags of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python packages/fafa/benchmarks/bench_fafa.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, (default, meaning) in SIZES.items():
        text = f"{meaning}; default {default}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--full-size", action="store_true", help="the paper's model with random weights")
    parser.add_argument(
        "--vit-precision",
        choices=("fp16", "bf16", "fp32"),
        default="fp16",
        help="precision of the frozen ViT with --full-size on a GPU; default fp16",
    )
    parser.add_argument("--compile", action="store_true", help="with --full-size: also measure a compiled ViT")
    parser.add_argument("--peak-tflops", type=float, help="peak of the GPU in the ViT's precision, for MFU")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data; default 0")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table."""
    args = build_parser().parse_args(argv)
    from tbps_common.errors import InputError

    for name, (default, _) in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, FULL_SIZE.get(name, default) if args.full_size else default)
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, but it is {getattr(args, name)}.")
    for name, unit in (("image_size", 14), ("vit_width", 64), ("qformer_width", 64)):
        if getattr(args, name) % unit:
            raise InputError(
                f"--{name.replace('_', '-')} must be a multiple of {unit}, but it is {getattr(args, name)}."
            )
    if args.batch_size < 2:
        raise InputError("--batch-size must be at least 2: a single triplet has nothing to be compared with.")
    import torch

    from bench_fafa_forms import evaluation, losses, training_step
    from bench_fafa_full_size import full_size
    from tbps_common.files import write_json
    from tbps_common.run.device import choose_device

    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    rows = full_size(args, device) if args.full_size else [*losses(args, device), *training_step(args, device)]
    rows += evaluation(args, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"{where}, batch {args.batch_size}, torch {torch.__version__}")
    print(f"{'':48}{'direct form':>14}{'this package':>14}{'ratio':>9}{'difference':>12}")
    for row in rows:
        print(_line(row))
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(args.json, {"flags": flags, "torch": torch.__version__, "machine": platform.machine(), "rows": rows})
    return 0


def _line(row: dict[str, Any]) -> str:
    direct, ours, apart = row.get("direct"), row["ours"], row.get("difference")
    text = f"{row['what']:48}" + (f"{direct:>14.5g}" if direct is not None else f"{'':>14}") + f"{ours:>14.5g}"
    # Of what is better when larger (images/s, MFU) the ratio is the inverse.
    ratio = None if direct is None else (ours / direct if row.get("more_is_better") else direct / ours)
    text += f"{ratio:>9.2f}" if ratio is not None else f"{'':>9}"
    return text + (f"{apart:>12.1e}" if apart is not None else "")


if __name__ == "__main__":
    sys.exit(main())
