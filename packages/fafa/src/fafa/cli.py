"""Console commands of fafa. Heavy libraries are imported when a command starts to work, not to print its help."""

from importlib import import_module

from tbps_common.run.command import command


@command
def train_main(argv: list[str]) -> int:
    """`src/blip_fine_tune_new.py`, `fafa-train`: train a model."""
    from fafa.options import check_training_flags, get_args
    from fafa.preflight import check_training_inputs

    args = get_args(argv)
    warnings = check_training_flags(args)
    resumed = None
    if args.resume:
        from fafa.training.run_directory import find_run

        resumed = find_run(args)
    inputs = check_training_inputs(args, resumed / "model_config.yaml" if resumed else None)
    from fafa.training.start import train

    return train(args, inputs, resumed=resumed, warnings=warnings)


@command
def infer_main(argv: list[str]) -> int:
    """`inference_fafa.py`, `fafa-infer`: evaluate a trained model on ITCPR."""
    from fafa.inference import main

    return main(argv)


@command
def index_main(argv: list[str]) -> int:
    """`fafa-index`: compute the features of a folder of images once."""
    from fafa.search import index

    return index(argv)


@command
def search_main(argv: list[str]) -> int:
    """`fafa-search`: find the images of an index that show the person of a picture with the changes of a sentence."""
    from fafa.search import search

    return search(argv)


@command
def itcpr_main(argv: list[str]) -> int:
    """`fafa-itcpr prepare`: put the images of ITCPR's three sources into the folders its annotation names."""
    from fafa.itcpr import main

    return main(argv)


@command
def syncpr_main(argv: list[str]) -> int:
    """`fafa-syncpr quadruples | images | filter | pack | pairs | lora | cost`: make training data of one's own."""
    from fafa.syncpr.options import build_parser

    flags = build_parser().parse_args(argv)
    return import_module(f"fafa.syncpr.{flags.stage}").main(flags)
