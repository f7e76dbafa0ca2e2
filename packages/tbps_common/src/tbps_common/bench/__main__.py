"""`python -m tbps_common.bench`: what the exact streaming ranking costs, beside the bare product and other ways.

python -m tbps_common.bench --preset small
python -m tbps_common.bench --preset cuhk --threads 1 --json cuhk.json
python -m tbps_common.bench --preset itcpr --queries 512 --gallery 6144 --threads 1
python -m tbps_common.bench --preset icfg --against naive,torchmetrics,faiss,pml
"""

import argparse
import sys

from tbps_common.bench.sizes import COMPARED, PRESETS, REDUCTIONS, chosen_sizes
from tbps_common.files import write_json
from tbps_common.run.arguments import whole_number
from tbps_common.run.command import command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tbps_common.bench",
        description="Time and memory of exact ranking on random clustered features, every method in a fresh process.",
    )
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="small", help="sizes to start from (default: small)"
    )
    count = whole_number(1)
    parser.add_argument("--queries", type=count, metavar="N", help="number of queries")
    parser.add_argument("--gallery", type=count, metavar="N", help="number of gallery images")
    parser.add_argument(
        "--tokens", type=count, metavar="N", help="tokens or attributes of an image (1: single vectors)"
    )
    parser.add_argument("--dim", type=count, metavar="N", help="width of a vector")
    parser.add_argument("--positives", type=_range, metavar="LO,HI", help="gallery images of one identity")
    parser.add_argument("--reduce", choices=REDUCTIONS, help="how tokens or attributes become one score")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to score (default: cpu)")
    parser.add_argument("--threads", type=count, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--precision", choices=("highest", "tf32", "bfloat16"), default="highest")
    parser.add_argument(
        "--repeats",
        type=count,
        default=3,
        metavar="N",
        help="calls of each method, of which the best counts (default: 3)",
    )
    parser.add_argument(
        "--against",
        type=_names,
        default=("naive",),
        metavar="NAMES",
        help=f"methods to compare with, separated by commas: {', '.join(COMPARED)} (default: naive)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    return parser


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"must be LO,HI (two integers, 1 <= LO <= HI), not {text!r}")
    return bounds


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    unknown = [name for name in names if name not in COMPARED]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}; choose from {', '.join(COMPARED)}")
    return names


@command
def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    sizes = chosen_sizes(
        arguments.preset,
        {name: getattr(arguments, name) for name in ("queries", "gallery", "tokens", "dim", "positives", "reduce")},
    )

    from tbps_common.bench.compare import compare, render

    report = compare(
        arguments.preset,
        sizes,
        against=arguments.against,
        device=arguments.device,
        threads=arguments.threads,
        precision=arguments.precision,
        repeats=arguments.repeats,
    )
    print(render(report))
    if arguments.json:
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
