"""`python -m mra.dad.cost`: arithmetic and GPU-hours of making a set of SDA's size, counted on networks of the real sizes.

The networks are built without weights (on torch's meta device), and every matrix product and convolution of one pair or
picture is counted, the backward pass included. GPU-hours follow from a card's peak rate and an assumed share of it.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mra.dad.options import EPOCHS, HEIGHT, VARIANTS, WIDTH
from tbps_common.run.arguments import HelpFormatter, number, whole_number
from tbps_common.run.command import command

CAPTIONS = 68126
"""Training captions of CUHK-PEDES."""
KEPT = 1 - 0.1063
"""Share of the pictures that SDA's filter left."""
CAPTION_TOKENS = 25
PEAKS = {"A100 (bf16)": 312.0, "RTX 3090 (fp16)": 71.0}
"""Teraflop per second of dense products with float32 sums, as the maker states them."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: subcommand.
        unit: what is counted.
        items: how many of them at the paper's size.
        flop: floating-point operations of one (a multiply-add is two).
    """

    name: str
    unit: str
    items: int
    flop: float


def stages(steps: int, captions: int = CAPTIONS) -> list[Stage]:
    """Count all stages.

    Args:
        steps: of the sampler, each with and without the prompt.
        captions: of the training set.
    """
    pictures = captions * VARIANTS
    kept = round(pictures * KEPT)
    pair, picture = diffusion_flop(steps)
    return [
        Stage("finetune", "pair", captions * EPOCHS, pair),
        Stage("generate", "picture", pictures, picture),
        Stage("filter", "picture", pictures, pose_flop()),
        Stage("caption", "picture", kept, captioner_flop()),
        Stage("regions", "picture", kept, detector_flop()),
    ]


def count(compute: Callable[[], Any]) -> float:
    """Floating-point operations of a computation."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        compute()
    return float(counter.get_total_flops())


def diffusion_flop(steps: int) -> tuple[float, float]:
    """Of one pair of the fine-tuning and of one generated picture, with Stable Diffusion 1.5 and a ControlNet."""
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).requires_grad_(False)
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        blocks: dict[str, Any] = {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        vae: Any = AutoencoderKL(**blocks, layers_per_block=2).requires_grad_(False)
        clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        text = CLIPTextModel(clip).requires_grad_(False)
        ids = torch.zeros(1, 77, dtype=torch.int64)
        states = torch.zeros(1, 77, 768)
        latents, time = torch.zeros(1, 4, HEIGHT // 8, WIDTH // 8), torch.zeros(1, dtype=torch.int64)
        white = torch.zeros(1, 3, HEIGHT, WIDTH)

    def denoise() -> Any:
        down, middle = controlnet(latents, time, states, controlnet_cond=white, return_dict=False)
        return unet(
            latents, time, states, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    encode_text = count(lambda: text(ids))
    training = count(lambda: denoise().sum().backward()) + count(lambda: vae.encode(white)) + encode_text
    with torch.no_grad():
        step, decode = count(denoise), count(lambda: vae.decode(latents))
    return training, 2 * steps * step + 2 * encode_text + decode


def pose_flop() -> float:
    """Of one picture, with ViTPose base."""
    import torch
    from transformers import VitPoseConfig, VitPoseForPoseEstimation

    backbone = {"model_type": "vitpose_backbone", "out_indices": [12]}
    with torch.device("meta"), torch.no_grad():
        keypoints: dict[str, Any] = {"num_labels": 17}
        model = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, **keypoints)).eval()
        return count(lambda: model(torch.zeros(1, 3, 256, 192)))


def captioner_flop() -> float:
    """Of one picture and its caption, with BLIP-2 and FLAN-T5 XL."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = {
        "model_type": "t5",
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_heads": 32,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
        "tie_word_embeddings": False,
    }
    config: Any = Blip2Config(text_config=text, image_token_index=32100)
    with torch.device("meta"), torch.no_grad():
        model = Blip2ForConditionalGeneration(config).eval()
        prompt = torch.zeros(1, 8, dtype=torch.int64)
        words = torch.zeros(1, CAPTION_TOKENS, dtype=torch.int64)
        picture = torch.zeros(1, 3, 224, 224)
        # With a cache, one pass over all words costs what one pass per word does.
        queries = torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size)
        total = count(
            lambda: model.qformer(
                query_embeds=queries, encoder_hidden_states=model.vision_model(picture).last_hidden_state
            )
        )
        seen = torch.zeros(1, config.num_query_tokens + prompt.shape[1], config.text_config.d_model)
        return total + count(lambda: model.language_model(inputs_embeds=seen, decoder_input_ids=words))


def detector_flop() -> float:
    """Of one picture, with Grounding DINO base at its usual size (shorter side 800 pixels)."""
    import torch
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    backbone = {
        "model_type": "swin",
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
        "window_size": 12,
        "image_size": 384,
        "out_indices": [2, 3, 4],
    }
    config = GroundingDinoConfig(backbone_config=backbone, disable_custom_kernels=True)
    # Its text masks depend on the words, which the meta device does not have: a real forward pass, of 930 MB.
    model = GroundingDinoForObjectDetection(config).eval()
    ids = torch.randint(1000, 2000, (1, CAPTION_TOKENS))
    ids[0, 0], ids[0, -2], ids[0, -1] = 101, 1012, 102
    picture = torch.zeros(1, 3, 800 * HEIGHT // WIDTH, 800)
    with torch.no_grad():
        return count(lambda: model(picture, input_ids=ids))


def table(found: list[Stage], share: float) -> str:
    """Rows of a Markdown table, and the sum."""
    cards = list(PEAKS)
    lines = [
        f"| stage | items | per item | all | {' | '.join(f'{card}, hours' for card in cards)} |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in cards)} |",
    ]
    sums = dict.fromkeys(cards, 0.0)
    for stage in found:
        everything = stage.items * stage.flop
        hours = {card: everything / (peak * 1e12 * share) / 3600 for card, peak in PEAKS.items()}
        for card, value in hours.items():
            sums[card] += value
        shown = " | ".join(f"{value:.1f}" for value in hours.values())
        lines.append(
            f"| {stage.name} | {stage.items:,} {stage.unit}s | {stage.flop / 1e12:.3f} TFLOP | "
            f"{everything / 1e18:.3g} EFLOP | {shown} |"
        )
    lines.append(f"| sum | | | | {' | '.join(f'{value:.0f}' for value in sums.values())} |")
    return "\n".join(lines)


@command
def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m mra.dad.cost", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--steps", type=whole_number(1), default=50, help="denoising steps per picture")
    parser.add_argument("--captions", type=whole_number(1), default=CAPTIONS, help="captions in the training set")
    parser.add_argument(
        "--share", type=number(0, 1.001, above=True), default=0.35, help="share of the peak throughput that is reached"
    )
    args = parser.parse_args(argv)
    print(table(stages(args.steps, args.captions), args.share))
    return 0


if __name__ == "__main__":
    sys.exit(main())
