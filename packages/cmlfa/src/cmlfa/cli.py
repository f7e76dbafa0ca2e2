"""Console commands of cmlfa. Heavy libraries are imported when a command starts to work, not to print its help."""

from tbps_common.run.command import command


@command
def train_main(argv: list[str]) -> int:
    """`train.py`, `cmlfa-train`: train a model."""
    from cmlfa.options import check_training_flags, get_args
    from cmlfa.preflight import check_data

    args = get_args(argv)
    check_training_flags(args)
    split = "val" if args.val_dataset == "val" else "test"
    check_data(args.dataset_name, args.root_dir, split=split, training=True)
    from cmlfa.training.start import train

    return train(args)


@command
def test_main(argv: list[str]) -> int:
    """`test.py`, `cmlfa-test`: evaluate a trained model on the test split."""
    from cmlfa.testing import main

    return main(argv)


@command
def visualize_main(argv: list[str]) -> int:
    """`visualize.py`, `cmlfa-visualize`: draw the ranked list of one caption."""
    from cmlfa.visualize import main

    return main(argv)


@command
def index_main(argv: list[str]) -> int:
    """`cmlfa-index`: compute the features of a folder of images once."""
    from cmlfa.search import index

    return index(argv)


@command
def search_main(argv: list[str]) -> int:
    """`cmlfa-search`: find the images of an index that fit a sentence."""
    from cmlfa.search import search

    return search(argv)
