"""The weight files that DiaNA knows: its own, SwinV2 and Llama."""

from tbps_common.models.layouts import Layout, Paper

PAPER = Paper(
    "DiaNA",
    (
        Layout(
            "checkpoint of DiaNA, the authors' layout (ours writes the same): a folder in the layout of the hub",
            (
                "vision_model.embeddings.patch_embeddings.projection.weight",
                "vision_projection.weight",
                "text_projection.weight",
                "logit_scale",
            ),
            "diana.convert:describe_diana",
        ),
        Layout(
            "SwinV2, Hugging Face's layout: start weights of DiaNA's image tower (--vision_pretrained)",
            (
                "swinv2.embeddings.patch_embeddings.projection.weight",
                "swinv2.encoder.layers.0.blocks.0.attention.self.logit_scale",
            ),
            "diana.convert:describe_swinv2",
        ),
        Layout(
            "SwinV2 without a head, Hugging Face's layout: start weights of DiaNA's image tower (--vision_pretrained)",
            ("embeddings.patch_embeddings.projection.weight", "encoder.layers.0.blocks.0.attention.self.logit_scale"),
            "diana.convert:describe_swinv2",
        ),
        Layout(
            "Llama, Hugging Face's layout: start weights of DiaNA's dialogue tower (--llama_pretrained)",
            (
                "model.embed_tokens.weight",
                "model.layers.0.self_attn.q_proj.weight",
                "model.layers.0.mlp.gate_proj.weight",
                "model.norm.weight",
            ),
            "diana.convert:describe_llama",
        ),
        Layout(
            "Llama without a head, Hugging Face's layout: start weights of DiaNA's dialogue tower (--llama_pretrained)",
            (
                "embed_tokens.weight",
                "layers.0.self_attn.q_proj.weight",
                "layers.0.mlp.gate_proj.weight",
                "norm.weight",
            ),
            "diana.convert:describe_llama",
        ),
    ),
)
