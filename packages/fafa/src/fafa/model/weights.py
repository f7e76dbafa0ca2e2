"""Released checkpoints (LAVIS's layout): the one table of their names beside ours, and the way into the model and out of it.

`layout(settings)` is in the official order, so that exports, parameter lists and optimizer states follow from it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fafa.model.settings import ModelSettings
from tbps_common.errors import CheckpointError

if TYPE_CHECKING:
    from fafa.model.blip2 import Blip2

POSITION_IDS = "Qformer.bert.embeddings.position_ids"
WORD_EMBEDDINGS = "Qformer.bert.embeddings.word_embeddings.weight"
QUERY_TOKENS = "query_tokens"
_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """One entry of the official state dict.

    Attributes:
        official: its key.
        own: names of the parameters that hold it; several are its equal parts along the first axis, none is a constant.
        twin: key of the entry with which it shares its tensor.
    """

    official: str
    own: tuple[str, ...]
    twin: str | None = None


def layout(settings: ModelSettings) -> tuple[Entry, ...]:
    """All entries of the official state dict of a model with these settings, in official order."""
    return tuple(_entries(settings))


def required_keys(settings: ModelSettings) -> list[str]:
    """Keys of the tensors that a complete checkpoint holds, in official order."""
    return [entry.official for entry in layout(settings) if entry.official != POSITION_IDS and entry.twin is None]


def position_key(vit_model: str) -> str:
    """Official key of the ViT's position table."""
    return "visual_encoder.pos_embed" if vit_model == "eva_clip_g" else "visual_encoder.positional_embedding"


def _entries(settings: ModelSettings) -> Iterator[Entry]:
    yield Entry(QUERY_TOKENS, ("query_tokens",))
    yield Entry("temp", ("temp",))
    yield from _eva(settings.vit_depth) if settings.vit_model == "eva_clip_g" else _clip(settings.vit_depth)
    yield from _affine("ln_vision", "ln_vision")
    yield Entry(POSITION_IDS, ())
    yield Entry(WORD_EMBEDDINGS, ("Qformer.word_embeddings.weight",))
    yield Entry("Qformer.bert.embeddings.position_embeddings.weight", ("Qformer.position_embeddings.weight",))
    yield from _affine("Qformer.bert.embeddings.LayerNorm", "Qformer.model.layernorm")
    for index in range(settings.qformer.num_hidden_layers):
        has_cross_attention = index % settings.cross_attention_freq == 0
        yield from _qformer_layer(
            f"Qformer.bert.encoder.layer.{index}", f"Qformer.model.encoder.layer.{index}", has_cross_attention
        )
    head = "Qformer.cls.predictions"
    yield Entry(f"{head}.bias", ("Qformer.lm_head.bias",))
    for part in ("dense", "LayerNorm"):
        yield from _affine(f"{head}.transform.{part}", f"Qformer.lm_head.transform.{part}")
    yield Entry(f"{head}.decoder.weight", ("Qformer.word_embeddings.weight",), twin=WORD_EMBEDDINGS)
    yield Entry(f"{head}.decoder.bias", ("Qformer.lm_head.bias",), twin=f"{head}.bias")
    for name in ("vision_proj", "text_proj", "itm_head"):
        yield from _affine(name, name)
    if settings.use_mlm:
        for number in (0, 2):
            yield from _affine(f"mlm_predictor.predictor.{number}", f"mlm_predictor.predictor.{number}")


def _affine(official: str, own: str) -> Iterator[Entry]:
    for part in ("weight", "bias"):
        yield Entry(f"{official}.{part}", (f"{own}.{part}",))


def _eva(depth: int) -> Iterator[Entry]:
    vit, own = "visual_encoder", "visual_encoder.trunk"
    yield Entry(f"{vit}.cls_token", (f"{own}.embeddings.class_embedding",))
    yield Entry(f"{vit}.pos_embed", (f"{own}.embeddings.position_embedding",))
    yield from _affine(f"{vit}.patch_embed.proj", f"{own}.embeddings.patch_embedding")
    for index in range(depth):
        block, layer = f"{vit}.blocks.{index}", f"{own}.encoder.layers.{index}"
        yield from _affine(f"{block}.norm1", f"{layer}.layer_norm1")
        yield Entry(f"{block}.attn.q_bias", (f"{layer}.self_attn.qkv.q_bias",))
        yield Entry(f"{block}.attn.v_bias", (f"{layer}.self_attn.qkv.v_bias",))
        yield Entry(f"{block}.attn.qkv.weight", (f"{layer}.self_attn.qkv.weight",))
        yield from _affine(f"{block}.attn.proj", f"{layer}.self_attn.projection")
        yield from _affine(f"{block}.norm2", f"{layer}.layer_norm2")
        yield from _affine(f"{block}.mlp.fc1", f"{layer}.mlp.fc1")
        yield from _affine(f"{block}.mlp.fc2", f"{layer}.mlp.fc2")


def _clip(depth: int) -> Iterator[Entry]:
    vit, own = "visual_encoder", "visual_encoder.trunk"
    yield Entry(f"{vit}.class_embedding", (f"{own}.embeddings.class_embedding",))
    yield Entry(f"{vit}.positional_embedding", (f"{own}.embeddings.position_embedding.weight",))
    yield Entry(f"{vit}.conv1.weight", (f"{own}.embeddings.patch_embedding.weight",))
    yield from _affine(f"{vit}.ln_pre", f"{own}.pre_layrnorm")  # the library's spelling
    for index in range(depth):
        block, layer = f"{vit}.transformer.resblocks.{index}", f"{own}.encoder.layers.{index}"
        for part in ("weight", "bias"):
            packed = tuple(f"{layer}.self_attn.{name}_proj.{part}" for name in "qkv")
            yield Entry(f"{block}.attn.in_proj_{part}", packed)
        yield from _affine(f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj")
        yield from _affine(f"{block}.ln_1", f"{layer}.layer_norm1")
        yield from _affine(f"{block}.mlp.c_fc", f"{layer}.mlp.fc1")
        yield from _affine(f"{block}.mlp.c_proj", f"{layer}.mlp.fc2")
        yield from _affine(f"{block}.ln_2", f"{layer}.layer_norm2")


def _qformer_layer(official: str, own: str, has_cross_attention: bool) -> Iterator[Entry]:
    for attention in ("attention", "crossattention") if has_cross_attention else ("attention",):
        for name in ("query", "key", "value"):
            yield from _affine(f"{official}.{attention}.self.{name}", f"{own}.{attention}.attention.{name}")
        for name in ("dense", "LayerNorm"):
            yield from _affine(f"{official}.{attention}.output.{name}", f"{own}.{attention}.output.{name}")
    for suffix in ("", "_query"):
        yield from _affine(f"{official}.intermediate{suffix}.dense", f"{own}.intermediate{suffix}.dense")
        for name in ("dense", "LayerNorm"):
            yield from _affine(f"{official}.output{suffix}.{name}", f"{own}.output{suffix}.{name}")


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
        ValueError: an unknown kind, or a table that is not a square grid and one token.
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


def load_from(model: nn.Module, state: Mapping[str, Tensor], source: str, strict: bool = False) -> LoadResult:
    """`load_official_state_dict` whose error names the file."""
    try:
        return load_official_state_dict(model, state, strict)
    except StateDictMismatch as error:
        raise StateDictMismatch(f"{source}: {error}") from None
