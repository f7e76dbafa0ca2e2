"""Console commands of tbps_common. Parsers live beside the code they drive and are imported only when asked for."""

from tbps_common.run.command import command


@command
def data_main(argv: list[str]) -> int:
    """`tbps-data check | convert`: look at a data set before a long run, and convert raw annotations."""
    from tbps_common.datasets.commands import main

    return main(argv)


@command
def model_main(argv: list[str]) -> int:
    """`tbps-model inspect | convert | export`: say what a weight file is, convert it, export its encoders."""
    from tbps_common.models.commands import main

    return main(argv)
