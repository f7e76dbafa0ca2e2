"""Console commands of dp_gen. Heavy libraries are imported when a command starts to work, not to print its help."""

from tbps_common.run.command import command


@command
def train_main(argv: list[str]) -> int:
    """`train.py`, `dp-train`: train the editor."""
    from dp_gen.options import training_flags

    args = training_flags(argv)
    from dp_gen.train import train

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
    from dp_gen.assemble import main

    return main(argv)
