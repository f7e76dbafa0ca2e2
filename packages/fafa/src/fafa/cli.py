"""Console commands of fafa: flags and files are read at once, the heavy libraries are imported when the work begins."""

from importlib import import_module

from fafa.options import check_training_flags, get_args, index_args, inference_args, search_args
from fafa.run_directory import find_run, read_run
from fafa.syncpr.options import build_parser as build_syncpr_parser
from tbps_common.models.source import find_model
from tbps_common.run.command import command


@command
def train_main(argv: list[str]) -> int:
    """`src/blip_fine_tune_new.py`, `fafa-train`: train a model."""
    args = get_args(argv)
    if args.resume_path and "://" not in args.resume_path:
        args.resume_path = find_model(args.resume_path, "--resume-path")
    warnings = check_training_flags(args)
    resumed = find_run(args.resume, args) if args.resume else None

    from fafa.inputs import read_inputs

    inputs = read_inputs(args, resumed)

    from fafa.train import train

    return train(args, inputs, resumed=resumed, warnings=warnings)


@command
def infer_main(argv: list[str]) -> int:
    """`inference_fafa.py`, `fafa-infer`: evaluate a trained model on ITCPR."""
    flags = inference_args(argv)
    run = read_run(flags)

    from fafa.inputs import check_itcpr

    itcpr = check_itcpr(flags.itcpr_root or run.itcpr_root)

    from fafa.inference import infer

    return infer(run, itcpr, flags)


@command
def index_main(argv: list[str]) -> int:
    """`fafa-index`: compute the features of a folder of images once."""
    flags = index_args(argv)
    run = read_run(flags)

    from fafa.search import index

    return index(run, flags)


@command
def search_main(argv: list[str]) -> int:
    """`fafa-search`: find the images of an index that show the person of a picture with the changes of a sentence."""
    flags = search_args(argv)
    run = read_run(flags)

    from fafa.search import search

    return search(run, flags)


@command
def itcpr_main(argv: list[str]) -> int:
    """`fafa-itcpr prepare`: put the images of ITCPR's three sources into the folders its annotation names."""
    from fafa.prepare_itcpr import main

    return main(argv)


@command
def syncpr_main(argv: list[str]) -> int:
    """`fafa-syncpr quadruples | images | filter | pack | pairs | lora | cost`: make training data of one's own."""
    flags = build_syncpr_parser().parse_args(argv)
    if getattr(flags, "ray", ""):  # not every stage has shards
        from tbps_common.pipeline.ray import run_on_ray

        return run_on_ray("fafa.cli:syncpr_main", argv, flags)
    return import_module(f"fafa.syncpr.{flags.stage}").main(flags)
