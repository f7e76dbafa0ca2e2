"""The weight files that MRA knows: its own (and its parent's, APTM), Swin and BERT."""

from tbps_common.models.layouts import Layout, Paper

_BERT = (
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.0.output.dense.weight",
)

PAPER = Paper(
    "MRA",
    (
        Layout(
            "checkpoint of MRA (or of its parent APTM), the authors' layout (ours writes the same)",
            (
                "vision_encoder.patch_embed.proj.weight",
                "vision_encoder.layers.0.blocks.0.attn.relative_position_bias_table",
                *(f"text_encoder.{name}" for name in _BERT),
                "itm_head.0.weight",
            ),
            "mra.convert:describe_mra",
        ),
        Layout(
            "Swin, the official layout: start weights of MRA's image encoder",
            (
                "patch_embed.proj.weight",
                "layers.0.blocks.0.attn.relative_position_bias_table",
                "layers.0.downsample.reduction.weight",
                "norm.weight",
            ),
            "mra.convert:describe_swin",
        ),
        Layout("BERT: start weights of MRA's text encoder, and of FAFA's Q-Former", _BERT, "mra.convert:describe_bert"),
    ),
    convert="mra.convert",
)
