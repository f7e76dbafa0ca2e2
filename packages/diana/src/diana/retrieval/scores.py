"""Rows of scores of the three modes: global features, attributes, and their sum."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diana.options import MODES
from diana.similarity import attribute_similarity
from tbps_common.errors import InputError
from tbps_common.ranking import score_rows

Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Features:
    """Unit-norm features of one side.

    Attributes:
        embeds: `[N, D]`.
        attributes: `[N, K, D]`, or None.
    """

    embeds: Tensor
    attributes: Tensor | None = None

    @classmethod
    def joined(cls, parts: Iterable[tuple[Tensor, Tensor | None]]) -> "Features":
        """The features of several batches as one."""
        embeds, attributes = zip(*parts)
        refined = [batch for batch in attributes if batch is not None]
        return cls(torch.cat(embeds), torch.cat(refined) if refined else None)


def score_rows_of(
    queries: Features,
    gallery: Features,
    *,
    mode: str,
    sim_type: str = "avg",
    sim_dtype: str = "fp32",
    device: torch.device | str | None = None,
) -> dict[str, Rows]:
    """Scorers `rows(start, stop) -> [stop - start, G]` of the rows that `mode` evaluates.

    Args:
        queries: of the dialogues.
        gallery: of the images.
        mode: `global`, `local` (both) or `all` (both and their sum).
        sim_type: reduction over the attributes.
        sim_dtype: `fp32`, or `native` to multiply in the features' own dtype, which gives many equal scores in bf16.
        device: where to score; by default where the features are.

    Raises:
        InputError: an unknown mode, or attributes that are missing.
    """
    if mode not in MODES:
        raise InputError(f"--mode must be one of {', '.join(MODES)}, but it is {mode!r}.")
    place = gallery.embeds.device if device is None else torch.device(device)
    if sim_dtype == "native":
        rows: dict[str, Rows] = {"global": _native(queries.embeds, gallery.embeds, place, lambda q, g: q @ g.t())}
    else:
        rows = {"global": score_rows(queries.embeds, gallery.embeds, device=place)}
    if mode == "global":
        return rows
    if queries.attributes is None or gallery.attributes is None:
        raise InputError(f"--mode {mode} needs the attributes of both sides: encode them with attributes=True.")
    if sim_dtype == "native":
        rows["local"] = _native(
            queries.attributes, gallery.attributes, place, lambda q, g: attribute_similarity(q, g, sim_type)
        )
    else:
        rows["local"] = score_rows(queries.attributes, gallery.attributes, reduce=f"attr_{sim_type}", device=place)
    if mode == "all":
        whole, local = rows["global"], rows["local"]
        rows["all"] = lambda start, stop: whole(start, stop) + local(start, stop)
    return rows


def _native(queries: Tensor, gallery: Tensor, place: torch.device, score: Callable[[Tensor, Tensor], Tensor]) -> Rows:
    there = gallery.to(place)
    return lambda start, stop: score(queries[start:stop].to(place), there)
