"""Sizes the data sets have according to their papers and releases."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A published number; `step` is the place it was rounded to ("1.15 M" has step 10,000)."""

    value: int
    step: int = 1

    def fits(self, found: int) -> bool:
        return 2 * abs(found - self.value) <= self.step if self.step > 1 else found == self.value

    def __str__(self) -> str:
        return f"{'~' if self.step > 1 else ''}{self.value:,}"


Sizes = dict[str, tuple[Size | None, ...]]


def _exactly(*values: int | None) -> tuple[Size | None, ...]:
    return tuple(None if value is None else Size(value) for value in values)


# ids, images, captions
_CUHK: Sizes = {
    "train": _exactly(11_003, 34_054, 68_126),
    "val": _exactly(1_000, 3_078, 6_158),
    "test": _exactly(1_000, 3_074, 6_156),
}
_ICFG: Sizes = {"train": _exactly(3_102, 34_674, 34_674), "test": _exactly(1_000, 19_848, 19_848)}
_RSTP: Sizes = {
    "train": _exactly(3_701, 18_505, 37_010),
    "val": _exactly(200, 1_000, 2_000),
    "test": _exactly(200, 1_000, 2_000),
}

PUBLISHED: dict[str, Sizes] = {
    "CUHK-PEDES": {**_CUHK, "all": _exactly(13_003, 40_206, None)},
    "ICFG-PEDES": {**_ICFG, "val": _exactly(0, 0, 0), "all": _exactly(4_102, 54_522, 54_522)},
    "RSTPReid": {**_RSTP, "all": _exactly(4_101, 20_505, 41_010)},
    "finetune": {
        f"{prefix} {split}": sizes
        for prefix, splits in (("cuhk", _CUHK), ("icfg", _ICFG), ("rstp", _RSTP))
        for split, sizes in splits.items()
    },
    "SDA": {"train": _exactly(1_217_750)},  # pairs
    "SynCPR": {"train": (Size(1_150_000, 10_000), Size(177_000, 1_000))},  # triplets, groups
    # items, person ids
    "ITCPR": {
        "query": _exactly(2_202),
        "gallery": _exactly(20_510),
        "query-target pairs": _exactly(2_225),
        "query Celeb-reID": _exactly(1_151, 512),
        "query PRCC": _exactly(146, 146),
        "query LAST": _exactly(905, 541),
    },
    "ChatPedes": {},
    "MALS": {"train": _exactly(1_510_330)},  # pairs
}
