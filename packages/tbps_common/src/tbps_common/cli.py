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


@command
def index_main(argv: list[str]) -> int:
    """`tbps-index`: bring a gallery up to date with the pictures on the disk, or delete from it."""
    from tbps_common.search.options import check_index_flags, index_parser

    flags = index_parser().parse_args(argv)
    check_index_flags(flags)
    from tbps_common.search.commands import index

    return index(flags)


@command
def search_main(argv: list[str]) -> int:
    """`tbps-search`: ask a gallery."""
    from tbps_common.search.options import check_search_flags, search_parser

    flags = search_parser().parse_args(argv)
    check_search_flags(flags)
    from tbps_common.search.commands import search

    return search(flags)


@command
def compare_main(argv: list[str]) -> int:
    """`tbps-compare`: several models, the same queries, one table."""
    from tbps_common.search.options import compare_parser

    flags = compare_parser().parse_args(argv)
    from tbps_common.search.compare import compare

    return compare(flags)


@command
def page_main(argv: list[str]) -> int:
    """`tbps-page`: search a gallery in the browser."""
    from tbps_common.search.options import page_parser

    flags = page_parser().parse_args(argv)
    from tbps_common.search.page import page

    return page(flags)
