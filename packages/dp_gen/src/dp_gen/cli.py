"""Console commands of dp_gen. Heavy libraries are imported when a command starts to work, not to print its help."""

from tbps_common.run.command import command


@command
def train_main(argv: list[str]) -> int:
    """`train.py`, `dp-train`: train the editor."""
    from dp_gen.options import check_training_flags, parse_args
    from dp_gen.preflight import check_training_inputs

    args = parse_args(argv)
    check_training_flags(args)
    check_training_inputs(args)
    from dp_gen.training.start import train

    return train(args)


@command
def segment_main(argv: list[str]) -> int:
    """`segment.py`, `dp-segment`: make a training folder from a data set's images and captions."""
    from dp_gen.segment import main

    return main(argv)


@command
def generate_main(argv: list[str]) -> int:
    """`generate.py`, `dp-generate`: new persons from references, and edits of existing images."""
    from dp_gen.generate import main

    return main(argv)


@command
def annotate_main(argv: list[str]) -> int:
    """`annotate.py`, `dp-annotate`: let a chat model rewrite the captions of edited images."""
    from dp_gen.annotate import main

    return main(argv)


@command
def pack_main(argv: list[str]) -> int:
    """`dp-pack`: generated images and their captions as a data set."""
    from dp_gen.pack import main

    return main(argv)


@command
def checkpoint_main(argv: list[str]) -> int:
    """`python -m dp_gen.checkpoint`: write a checkpoint in the authors' layout."""
    from dp_gen.checkpoint import run

    return run(argv)


@command
def check_data_main(argv: list[str]) -> int:
    """`python -m dp_gen.data`: check a training folder."""
    from dp_gen.data.check import main

    return main(argv)
