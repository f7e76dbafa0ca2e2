"""State dicts in the official layout: into the model, out of it, and its position tables resized."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fafa.model.layout import POSITION_IDS, QUERY_TOKENS, Entry, position_key
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import find_state_dict

if TYPE_CHECKING:
    from fafa.model.backbone import Blip2

_SHOWN = 5


class StateDictMismatch(CheckpointError, RuntimeError):
    """A state dict does not fit the model. Also a RuntimeError, as torch's own `load_state_dict` raises."""


@dataclass(frozen=True)
class LoadResult:
    """What did not meet its counterpart, in official names.

    Attributes:
        missing_keys: entries of the model that the state dict lacks.
        unexpected_keys: entries of the state dict that the model lacks.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)


def unwrap(model: nn.Module) -> "Blip2":
    """The model itself, also when DistributedDataParallel wraps it."""
    return getattr(model, "module", model)  # pyright: ignore[reportReturnType]


def official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights under LAVIS's names, in its order. Values share memory with the model where they are not composed."""
    model = unwrap(model)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {entry.official: _export(model, own, entry) for entry in model.entries()}


def _export(model: "Blip2", own: Mapping[str, Tensor], entry: Entry) -> Tensor:
    if entry.official == POSITION_IDS:
        return torch.arange(model.settings.qformer.max_position_embeddings)[None]
    parts = [own[name] for name in entry.own]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def official_named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Official name and parameter, for all that correspond one to one, in official order; tied ones once.

    What CLIP's tower stores as one packed projection is three parameters here and therefore not among them.
    """
    model = unwrap(model)
    own = dict(model.named_parameters())
    for entry in model.entries():
        if len(entry.own) == 1 and entry.twin is None:
            yield entry.official, own[entry.own[0]]


def ordered_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter once, in official order."""
    model = unwrap(model)
    own = dict(model.named_parameters())
    for entry in model.entries():
        if entry.twin is None:
            yield from (own[name] for name in entry.own)


@torch.no_grad()
def load_official_state_dict(model: nn.Module, sd: Mapping[str, Tensor], strict: bool = False) -> LoadResult:
    """Copy a state dict in LAVIS's layout into the model: all that fits, or nothing if a shape is wrong.

    A position table of another grid is interpolated. Of `query_tokens` with another number of rows, the first ones are
    taken, and rows that the file lacks keep their values.

    Args:
        model: receives the weights, converted to its own dtypes.
        sd: tensors by official name.
        strict: a missing or unexpected key is an error.

    Returns:
        Missing and unexpected keys. `position_ids`, and an output matrix whose twin is present, do not count as missing.

    Raises:
        StateDictMismatch: a tensor has the wrong shape, or `strict` and the keys differ.
    """
    model = unwrap(model)
    entries = model.entries()
    known = {entry.official for entry in entries}
    result = LoadResult(
        missing_keys=[
            entry.official
            for entry in entries
            if entry.official not in sd and entry.official != POSITION_IDS and entry.twin not in sd
        ],
        unexpected_keys=[key for key in sd if key not in known],
    )
    if strict and (result.missing_keys or result.unexpected_keys):
        raise StateDictMismatch(
            f"The weights do not fit this model: {_listed('missing', result.missing_keys)}"
            f"{_listed('unexpected', result.unexpected_keys)}give the checkpoint of this model."
        )
    own = dict(model.named_parameters())
    copies: list[tuple[Tensor, Tensor]] = []
    misfits: list[str] = []
    for entry in entries:
        if entry.official not in sd or entry.official == POSITION_IDS or entry.twin in sd:
            continue
        targets = [own[name] for name in entry.own]
        value = sd[entry.official]
        value = _fitted(model, entry.official, value, targets[0])
        wanted = [len(targets) * len(targets[0]), *targets[0].shape[1:]] if len(targets) > 1 else [*targets[0].shape]
        if entry.official == QUERY_TOKENS and value.dim() == 3 and value.shape[::2] == targets[0].shape[::2]:
            rows = min(value.shape[1], targets[0].shape[1])
            copies.append((targets[0][:, :rows], value[:, :rows]))
        elif not value.is_floating_point() or [*value.shape] != wanted:
            misfits.append(f"{entry.official} {[*value.shape]} instead of {wanted}")
        else:
            copies.extend(zip(targets, value.chunk(len(targets)) if len(targets) > 1 else [value]))
    if misfits:
        raise StateDictMismatch(
            f"The weights do not fit this model: {_listed('of another shape', misfits)}"
            "give the checkpoint of this model, or the backbone it was trained with."
        )
    for target, value in copies:
        target.copy_(value)
    return result


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(names[:_SHOWN])}{more}; " if names else ""


def _fitted(model: "Blip2", key: str, value: Tensor, target: Tensor) -> Tensor:
    """The position table at the model's grid; anything else as it is."""
    kind = "eva" if model.settings.vit_model == "eva_clip_g" else "clip"
    if key != position_key(model.settings.vit_model) or value.dim() != target.dim():
        return value
    if value.shape[-1] != target.shape[-1] or not is_square(value.shape[-2] - 1):
        return value
    return interpolate_pos_embed(value, model.settings.image_size // model.settings.patch_size, kind)


def is_square(number: int) -> bool:
    """Whether a number of patches is that of a square grid."""
    return number > 0 and round(number**0.5) ** 2 == number


def interpolate_pos_embed(table: Tensor, grid_new: int, kind: str) -> Tensor:
    """Resize the grid of a position table bicubically; the class token's row stays.

    Args:
        table: `[1, n + 1, W]` (`eva`) or `[n + 1, W]` (`clip`), n a square number.
        grid_new: side of the new grid.
        kind: `eva` resizes with pixel centres, `clip` with aligned corners, as LAVIS does for each.

    Returns:
        The table at `grid_new * grid_new + 1` rows, same rank and dtype; `table` itself if the grid is the same.

    Raises:
        ValueError: an unknown kind, or a table that is no square grid and one token.
    """
    if kind not in ("eva", "clip"):
        raise ValueError(f"kind must be 'eva' or 'clip', got {kind!r}.")
    patches = table.shape[-2] - 1
    if table.dim() != (3 if kind == "eva" else 2) or not is_square(patches):
        raise ValueError(f"A position table of shape {[*table.shape]} is not one token and a square grid ({kind}).")
    grid_old = round(patches**0.5)
    if grid_old == grid_new:
        return table
    rows = table.reshape(patches + 1, -1)
    grid = rows[1:].float().view(1, grid_old, grid_old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(grid_new, grid_new), mode="bicubic", align_corners=kind == "clip")
    resized = torch.cat([rows[:1], grid.permute(0, 2, 3, 1).reshape(grid_new**2, -1).to(table.dtype)])
    return resized[None] if kind == "eva" else resized


def load_weights(model: nn.Module, content: object, source: str, strict: bool = False) -> LoadResult:
    """Load what a checkpoint file held, naming the file in errors."""
    state, _ = find_state_dict(content, source=source)
    try:
        return load_official_state_dict(model, state, strict)
    except StateDictMismatch as error:
        raise StateDictMismatch(f"{source}: {error}") from None
