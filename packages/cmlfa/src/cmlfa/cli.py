"""Console commands of cmlfa: parse, check what needs no model, then import what does the work.

The checks come before torch is imported, so that help, a wrong path or unusable data are answered within a second.
"""

from cmlfa.datasets.annotations import read_annotations
from cmlfa.options import (
    check_training_flags,
    get_args,
    index_parser,
    search_parser,
    test_parser,
    visualize_parser,
)
from cmlfa.run_directory import find_weights, read_run
from tbps_common.errors import InputError
from tbps_common.run.command import command


@command
def train_main(argv: list[str]) -> int:
    """`train.py`, `cmlfa-train`: train a model."""
    options = get_args(argv)
    check_training_flags(options)
    data = read_annotations(options, options.validation_split, training=True)
    from cmlfa.train import train

    return train(options, data)


@command
def test_main(argv: list[str]) -> int:
    """`test.py`, `cmlfa-test`: evaluate a trained model on the test split."""
    flags = test_parser().parse_args(argv)
    options = read_run(flags)
    data = read_annotations(options, "test", i2t=flags.i2t)
    find_weights(options, flags)
    from cmlfa.evaluate import test

    return test(flags, options, data)


@command
def visualize_main(argv: list[str]) -> int:
    """`visualize.py`, `cmlfa-visualize`: draw the ranked list of one caption."""
    flags = visualize_parser().parse_args(argv)
    options = read_run(flags)
    data = read_annotations(options, "test")
    from cmlfa.visualize import visualize

    visualize(flags, options, data)
    return 0


@command
def index_main(argv: list[str]) -> int:
    """`cmlfa-index`: compute the features of a folder of images once."""
    flags = index_parser().parse_args(argv)
    options = read_run(flags)
    from cmlfa.search import index

    return index(flags, options)


@command
def search_main(argv: list[str]) -> int:
    """`cmlfa-search`: find the images of an index that match a sentence."""
    flags = search_parser().parse_args(argv)
    if not flags.text.strip():
        raise InputError("--text is empty: describe the person to look for")
    options = read_run(flags)
    from cmlfa.search import search

    return search(flags, options)
