"""The weight files that CMLFA knows: its own, and the CLIP models it starts from."""

from tbps_common.models.layouts import Layout, Paper

PAPER = Paper(
    "CMLFA",
    (
        Layout(
            "checkpoint of CMLFA, the authors' layout (ours writes the same)",
            (
                "base_model.visual.proj",
                "base_model.text_projection",
                "safl.part_tokens",
                "shared_transformer.resblocks.0.attn.in_proj_weight",
            ),
            "cmlfa.convert:describe_cmlfa",
        ),
        Layout(
            "CLIP with a ViT, OpenAI's layout (also of open_clip): start weights of CMLFA",
            ("visual.conv1.weight", "visual.proj", "text_projection", "token_embedding.weight", "positional_embedding"),
            "cmlfa.convert:describe_clip",
        ),
        Layout(
            "CLIP with a ResNet, OpenAI's layout: CMLFA cannot start from it",
            (
                "visual.conv1.weight",
                "visual.attnpool.positional_embedding",
                "text_projection",
                "token_embedding.weight",
            ),
        ),
    ),
    convert="cmlfa.convert",
)
