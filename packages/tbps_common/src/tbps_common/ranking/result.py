"""What an evaluation returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from prettytable import PrettyTable


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Metrics of one retrieval direction, and the best gallery positions of each query. All tensors on CPU.

    Attributes:
        metrics: `R1`, `R5`, `R10`, `mAP`, `mINP` in percent; `mFR`, the 0-based mean rank of the first positive.
        cmc: float32 `[max_rank]`, percent.
        ap: float64 `[Q]`, fractions; NaN for a query without positive (0 under `on_missing="miss"`).
        inp: float64 `[Q]`, likewise.
        first_rank: int64 `[Q]`, 1-based; 0 for a query without positive (G + 1 under `miss`).
        indices: int64 `[Q, min(topk, G)]`, best gallery positions; `None` with `topk=0`.
        scores: their scores.
        num_queries: Q.
        num_missing: queries without a positive.
    """

    metrics: dict[str, float]
    cmc: Tensor
    ap: Tensor
    inp: Tensor
    first_rank: Tensor
    indices: Tensor | None
    scores: Tensor | None
    num_queries: int
    num_missing: int

    def __str__(self) -> str:
        percent = "  ".join(f"{name} {self.metrics[name]:.2f}" for name in ("R1", "R5", "R10", "mAP", "mINP"))
        missing = f", {self.num_missing} without a positive" if self.num_missing else ""
        return f"{percent}  mFR {self.metrics['mFR']:.2f}  ({self.num_queries} queries{missing})"

    def table(
        self,
        task: str = "t2i",
        columns: Sequence[str] = ("R1", "R5", "R10", "mAP", "mINP"),
        decimals: int = 3,
    ) -> "PrettyTable":
        """The table the papers' code prints; further rows (`[task, *values]`) can be added to it.

        Args:
            task: entry of the first column.
            columns: names out of `metrics`.
            decimals: places shown.

        Raises:
            ValueError: a column that is no metric.
        """
        from prettytable import PrettyTable

        unknown = [name for name in columns if name not in self.metrics]
        if unknown:
            raise ValueError(f"columns must be among {', '.join(self.metrics)}, got {', '.join(unknown)}.")
        table = PrettyTable(["task", *columns])
        table.align["task"] = "r"  # as the papers' logs have it: `|  t2i | 73.379 |`
        for name in columns:
            table.custom_format[name] = lambda _, value: f"{value:.{decimals}f}"
        table.add_row([task, *(self.metrics[name] for name in columns)])
        return table
