"""Console commands of mra. Heavy libraries are imported when a command starts to work, not to print its help."""

from importlib import import_module

from tbps_common.run.command import command


@command
def run_main(argv: list[str]) -> int:
    """`run.py`, `mra-run`: pre-train, fine-tune or evaluate, in as many processes as there are GPUs."""
    from mra.options import build_run_parser

    args = build_run_parser().parse_args(argv)
    from mra.launch import launch

    return launch(args)


@command
def retrieval_main(argv: list[str]) -> int:
    """`Retrieval.py`, `mra-retrieval`: one process of a run."""
    from mra.options import build_retrieval_parser

    args = build_retrieval_parser().parse_args(argv)
    from mra.config import load_config
    from mra.control import Control
    from mra.preflight import check_run

    config = load_config(args.config)
    # run.py has looked at the data already, and its processes need not list a million images once more each.
    check_run(config, args.config, args, data=Control.of_this_process() is None)
    from mra.training.start import start

    return start(config, args)


@command
def index_main(argv: list[str]) -> int:
    """`mra-index`: compute the features of a folder of images once."""
    from mra.search import index

    return index(argv)


@command
def search_main(argv: list[str]) -> int:
    """`mra-search`: find the images of an index that fit a sentence."""
    from mra.search import search

    return search(argv)


@command
def dad_main(argv: list[str]) -> int:
    """`mra-dad`: make a synthetic pre-training set in the style of a target data set."""
    from mra.dad.options import build_parser

    args = build_parser().parse_args(argv)
    return import_module(f"mra.dad.{args.command}").main(args)
