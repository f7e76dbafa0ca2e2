"""What the parsers of all commands share: a help formatter, and types that refuse what would fail later.

A type's message comes after argparse's own `argument --flag:`; the exit status is 2.
"""

import argparse
import math
from collections.abc import Callable, Mapping

BAD_IMAGES = ("stop", "skip")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the command's line breaks and shows every default."""


def parser_of_commands(
    prog: str, description: str, commands: Mapping[str, tuple[str, str]]
) -> tuple[argparse.ArgumentParser, list[argparse.ArgumentParser]]:
    """A parser whose first argument is one of several commands; the attribute `command` of its result is which one.

    Args:
        prog: name of the program.
        description: of the program.
        commands: by name, one line for the program's help, and the description for the command's own.

    Returns:
        The parser, and those of the commands, which take the flags.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parsers = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(commands)}}}")
    return parser, [
        parsers.add_parser(name, help=line, description=more, allow_abbrev=False)
        for name, (line, more) in commands.items()
    ]


def whole_number(minimum: int) -> Callable[[str], int]:
    """argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expects a whole number, not {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {value}")
        return value

    return parse


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """argparse type: a finite number in [low, high), or in (low, high) with `above`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expects a number, not {text!r}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        if value < low or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {low:g}, not {value:g}")
        if value >= high:
            raise argparse.ArgumentTypeError(f"must be below {high:g}, not {value:g}")
        return value

    return parse


def add_require_published_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--require_published 0.2`, for `tbps_common.report.published.published_report`."""
    parser.add_argument(
        "--require_published",
        "--require-published",
        type=number(0),
        metavar="PERCENT",
        help="exit with status 1 if the result differs by more than this from the published one (in percent of R@k and mAP), "
        "or if nothing is published for a test set of this name and size",
    )


def add_tf32_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--tf32`, for `tbps_common.run.device.allow_tf32`."""
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="encode in TF32 where a GPU computes in float32: several times as fast, features equal to about three digits; "
        "similarities stay float32",
    )


def add_bad_images_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--bad_images stop | skip`, for `tbps_common.run.batches.replaced_items`."""
    parser.add_argument(
        "--bad_images",
        "--bad-images",
        choices=BAD_IMAGES,
        default="stop",
        help="a training image that cannot be read ends the run, or the next sample takes its place (they are counted)",
    )
