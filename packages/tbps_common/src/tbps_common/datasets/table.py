"""Size tables of data sets, for people."""

import logging
from collections.abc import Iterable, Sequence

logger = logging.getLogger("tbps_common.datasets")


def format_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The rows as a text table; whole numbers are right-aligned with thousands separators."""
    from prettytable import PrettyTable

    table = PrettyTable(list(columns))
    table.align = "r"
    table.align[columns[0]] = "l"
    for row in rows:
        table.add_row([f"{cell:,}" if isinstance(cell, int) else cell for cell in row])
    return table.get_string()


def log_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Log a table at level INFO; nothing is built when nobody listens."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s\n%s", title, format_table(columns, rows))
