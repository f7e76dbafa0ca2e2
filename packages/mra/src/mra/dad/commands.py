"""From `mra-dad`'s command line to the stage it names."""

from importlib import import_module

from mra.dad.options import build_parser


def main(argv: list[str]) -> int:
    """Run a subcommand; returns its exit status.

    Raises:
        InputError: one sentence about what the user gave.
    """
    args = build_parser().parse_args(argv)
    return import_module(f"mra.dad.{args.command}").main(args)
