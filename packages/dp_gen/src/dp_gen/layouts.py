"""The weight files that Diverse Person knows: its own, FastComposer's, and Stable Diffusion's."""

from tbps_common.models.layouts import Layout, Paper

_STABLE_DIFFUSION = ("unet.conv_in.weight", "vae.decoder.conv_in.weight", "unet.time_embedding.linear_1.weight")
_TOGETHER = (*_STABLE_DIFFUSION, "image_encoder.visual_projection.weight")

PAPER = Paper(
    "Diverse Person",
    (
        Layout(
            "checkpoint of Diverse Person, the authors' layout or ours",
            (*_TOGETHER, "controller.mlp1.fc1.weight"),
            "dp_gen.convert:describe_dp",
        ),
        Layout(
            "checkpoint of FastComposer: start weights of Diverse Person (--load_model)",
            (*_TOGETHER, "postfuse_module.mlp1.fc1.weight"),
            "dp_gen.convert:describe_dp",
        ),
        Layout(
            "Stable Diffusion, diffusers' layout: start weights of Diverse Person (--pretrained_model_hf)",
            _STABLE_DIFFUSION,
            "dp_gen.convert:describe_stable_diffusion",
        ),
        Layout(
            "U-Net of Stable Diffusion, diffusers' layout: a part of what Diverse Person starts from",
            (
                "conv_in.weight",
                "time_embedding.linear_1.weight",
                "down_blocks.0.resnets.0.conv1.weight",
                "conv_out.weight",
            ),
            "dp_gen.convert:describe_unet",
        ),
        Layout(
            "VAE of Stable Diffusion, diffusers' layout: a part of what Diverse Person starts from",
            ("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"),
            "dp_gen.convert:describe_vae",
        ),
        *(
            Layout(
                "text encoder of Stable Diffusion, Hugging Face's layout: a part of what Diverse Person starts from",
                (f"{prefix}embeddings.token_embedding.weight", f"{prefix}final_layer_norm.weight"),
                "dp_gen.convert:describe_text_encoder",
            )
            for prefix in ("text_model.", "")
        ),
        Layout(
            "CLIP, Hugging Face's layout: its image half is what Diverse Person starts from (--image_encoder_hf)",
            (
                "vision_model.embeddings.class_embedding",
                "vision_model.post_layernorm.weight",
                "visual_projection.weight",
            ),
            "dp_gen.convert:describe_clip",
        ),
        Layout(
            "Stable Diffusion in one file, the layout of its authors: convert it to diffusers' layout first",
            (
                "model.diffusion_model.input_blocks.0.0.weight",
                "first_stage_model.encoder.conv_in.weight",
                "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            ),
        ),
    ),
)
