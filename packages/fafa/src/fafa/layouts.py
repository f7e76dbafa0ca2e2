"""The weight files that FAFA knows: its own, LAVIS's BLIP-2, and the towers that these are made of."""

from tbps_common.models.layouts import Layout, Paper

_BLIP2 = (
    "query_tokens",
    "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.bert.encoder.layer.0.crossattention.self.query.weight",
    "vision_proj.weight",
    "text_proj.weight",
    "itm_head.weight",
)

PAPER = Paper(
    "FAFA",
    (
        Layout(
            "checkpoint of FAFA, the authors' layout (ours writes the same)",
            (*_BLIP2, "mlm_predictor.predictor.0.weight"),
            "fafa.convert:describe_blip2",
        ),
        Layout("BLIP-2 stage 1 of LAVIS: start weights of FAFA", _BLIP2, "fafa.convert:describe_blip2"),
        Layout(
            "BLIP-2 for image-text retrieval, Hugging Face's layout: start weights of FAFA (pretrained: hf:FOLDER)",
            ("query_tokens", "embeddings.word_embeddings.weight", "qformer.layernorm.weight", "itm_head.weight"),
        ),
        Layout(
            "EVA-CLIP ViT-g of LAVIS: vit_weights of FAFA",
            ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.attn.qkv.weight"),
            "fafa.convert:describe_vit",
        ),
        Layout(
            "CLIP ViT-L of LAVIS: vit_weights of FAFA",
            ("class_embedding", "positional_embedding", "conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"),
            "fafa.convert:describe_vit",
        ),
    ),
    convert="fafa.convert",
)
