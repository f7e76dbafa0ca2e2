"""The layout of released checkpoints (LAVIS's names), entry by entry, beside the names of this package's modules.

`layout(settings)` is the one table. It is in the official order, so that exports, parameter lists and optimizer states
follow from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fafa.model.settings import ModelSettings

POSITION_IDS = "Qformer.bert.embeddings.position_ids"
WORD_EMBEDDINGS = "Qformer.bert.embeddings.word_embeddings.weight"
QUERY_TOKENS = "query_tokens"


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
