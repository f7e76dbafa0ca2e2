"""Console commands of mra. Heavy libraries are imported when a command starts to work, not to print its help."""

from importlib import import_module

from mra.dad.options import build_parser as build_dad_parser
from mra.options import build_index_parser, build_retrieval_parser, build_run_parser, build_search_parser
from tbps_common.models.source import find_model
from tbps_common.run.command import command


@command
def run_main(argv: list[str]) -> int:
    """`run.py`, `mra-run`: pre-train, fine-tune or evaluate, in as many processes as there are GPUs."""
    args = build_run_parser().parse_args(argv)
    args.checkpoint = find_model(args.checkpoint, "--checkpoint")
    from mra.launch import launch

    return launch(args)


@command
def retrieval_main(argv: list[str]) -> int:
    """`Retrieval.py`, `mra-retrieval`: one process of a run."""
    args = build_retrieval_parser().parse_args(argv)
    args.checkpoint = find_model(args.checkpoint, "--checkpoint")
    from mra.config import load_config
    from mra.launch import LaunchFolder
    from mra.preflight import check_run

    config = load_config(args.config)
    # run.py has checked the data already: its processes need not look for a million images again.
    annotation = check_run(config, args.config, args, data=LaunchFolder.of_this_process() is None)
    from mra.launched import run_launched

    return run_launched(config, args, annotation)


@command
def index_main(argv: list[str]) -> int:
    """`mra-index`: compute the features of a folder of images once."""
    args = build_index_parser().parse_args(argv)
    from mra.search import index

    return index(args)


@command
def search_main(argv: list[str]) -> int:
    """`mra-search`: find the images of an index that fit a sentence."""
    args = build_search_parser().parse_args(argv)
    from mra.search import search

    return search(args)


@command
def dad_main(argv: list[str]) -> int:
    """`mra-dad`: make a synthetic pre-training set in the style of a target data set."""
    args = build_dad_parser().parse_args(argv)
    stage = import_module(f"mra.dad.{args.command}").main
    if not getattr(args, "ray", ""):  # not every subcommand has shards
        return stage(args)

    from tbps_common.pipeline.ray import run_on_ray

    status = run_on_ray("mra.cli:dad_main", argv, args)
    if status == 0 and args.command == "regions":
        return stage(build_dad_parser().parse_args([*argv, "--pack"]))
    return status
