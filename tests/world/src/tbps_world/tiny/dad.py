"""`mra-dad-make-tiny`: small models in the layouts of the real ones, so that every stage runs without a download.

They are built by the libraries' own classes from small configurations, with random weights, and found by the commands
through the ordinary flags. With `--steps` the diffusion model and the captioner are trained on pictures, so that what they
make can be looked at; detector and pose model stay random, and what they find means nothing.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mra.dad.options import add_data, add_size
from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.run.arguments import HelpFormatter, whole_number

DESCRIPTION = """\
Write small models in the layouts of the real ones: DIR/diffusion, DIR/captioner, DIR/detector, DIR/pose, to try the stages
of mra-dad with.
"""

MANIFEST_NAME = "tiny.json"
DIFFUSION, CAPTIONER, DETECTOR, POSE = "diffusion", "captioner", "detector", "pose"
TOKENS = 48
_DOWNSAMPLING = 4


def main(argv: list[str]) -> int:
    """Write the models; returns the exit status.

    Raises:
        InputError: the lexicon or the pictures cannot be used.
    """
    parser = argparse.ArgumentParser(prog="mra-dad-make-tiny", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write the models into")
    parser.add_argument("--lexicon", required=True, metavar="FILE", help="words of the captions, one per line")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the random weights")
    add_size(parser, height=64, width=32)
    group = parser.add_argument_group("training (without --steps all weights stay random)")
    group.add_argument(
        "--steps",
        type=whole_number(0),
        default=0,
        help="training steps of the diffusion model, a third as many for the captioner, on:",
    )
    add_data(group)
    args = parser.parse_args(argv)
    from tbps_common.pipeline.models import require_libraries

    require_libraries("mra-dad-make-tiny", "packages/mra[dad]", "diffusers", "accelerate")
    from tbps_world.tiny.mra import make_vocabulary, read_lexicon

    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    step = 2 * _DOWNSAMPLING
    if args.height % step or args.width % step:
        raise InputError(f"--height {args.height} and --width {args.width} must be multiples of {step}")
    words = make_vocabulary([*read_lexicon(Path(args.lexicon)), "describe", "the", "image", "in", "english"])
    data = None
    if args.steps:
        from tbps_common.datasets import load_processed_train
        from tbps_common.images import check_images_exist

        data = load_processed_train(args.train_file, args.image_root)
        check_images_exist(data.image_paths, args.image_root, flag="--image_root")
    (out / MANIFEST_NAME).unlink(missing_ok=True)  # it says that all of them are whole
    write_models(out, words, (args.height, args.width), args.seed)
    if data is not None:
        from tbps_world.tiny.dad_training import train_captioner, train_diffusion

        train_diffusion(out / DIFFUSION, data, (args.height, args.width), args.steps, args.seed)
        train_captioner(out / CAPTIONER, data, -(-args.steps // 3), args.seed)  # sentences are learnt sooner
    write_json(out / MANIFEST_NAME, {name: getattr(args, name) for name in ("seed", "steps", "height", "width")})
    print(f"written to {out}: {DIFFUSION}, {CAPTIONER}, {DETECTOR}, {POSE}")
    return 0


def write_models(out: Path, words: list[str], size: tuple[int, int], seed: int) -> None:
    """Write the four models.

    Args:
        out: folder; what it holds of them is replaced.
        words: the vocabulary, by id.
        size: height and width of the pictures, multiples of 8.
        seed: of the weights.
    """
    import torch

    from tbps_common.pipeline.models import quiet_libraries

    writers: dict[str, Callable[[Path, list[str], tuple[int, int]], None]] = {
        DIFFUSION: _write_diffusion,
        CAPTIONER: _write_captioner,
        DETECTOR: _write_detector,
        POSE: _write_pose,
    }
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        for name, write in writers.items():
            torch.manual_seed(seed)
            if (out / name).exists():
                shutil.rmtree(out / name)
            write(out / name, words, size)


def tokenizer(words: list[str]) -> Any:
    """A word-piece tokenizer of a vocabulary, for all tiny models."""
    from transformers import BertTokenizer

    return BertTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        do_lower_case=True,
        model_max_length=TOKENS,
        bos_token="[CLS]",
        eos_token="[SEP]",
    )


def _write_diffusion(folder: Path, words: list[str], size: tuple[int, int]) -> None:
    """Shaped as Stable Diffusion 1.5: CLIP text encoder, VAE, UNet with cross-attention, noise prediction."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            pad_token_id=words.index("[PAD]"),
            bos_token_id=words.index("[CLS]"),
            eos_token_id=words.index("[SEP]"),
            initializer_factor=1.0,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=size[0] // _DOWNSAMPLING,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    # The annotations of these classes know tuples of one block only.
    blocks: dict[str, Any] = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    vae = AutoencoderKL(
        **blocks,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=size[0],
        mid_block_add_attention=False,
    )
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer(words), unet=unet, scheduler=scheduler, **absent
    )
    pipeline.save_pretrained(folder)


def _write_captioner(folder: Path, words: list[str], size: tuple[int, int]) -> None:
    """Shaped as BLIP-2 with T5; one token more than the vocabulary, for the places of the picture."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    queries = 4
    config = Blip2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        qformer_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": len(words),
        },
        text_config={
            "model_type": "t5",
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": len(words) + 1,
            "tie_word_embeddings": False,
            "decoder_start_token_id": words.index("[CLS]"),
            "pad_token_id": words.index("[PAD]"),
            "eos_token_id": words.index("[SEP]"),
        },
        num_query_tokens=queries,
        image_token_index=len(words),
    )
    model = Blip2ForConditionalGeneration(config)
    # Only words can win, so that a random network says something, too (letters and special tokens come first).
    first_word = max(number for number, word in enumerate(words) if len(word) == 1 or word.startswith("##")) + 1
    with torch.no_grad():
        head = model.language_model.lm_head.weight
        head.normal_(std=0.3)
        head[: min(first_word, len(words) - 1)] = 0
        head[len(words) :] = 0
    model.save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    Blip2Processor(processor, tokenizer(words), num_query_tokens=queries).save_pretrained(folder)


def _write_detector(folder: Path, words: list[str], size: tuple[int, int]) -> None:
    """Shaped as Grounding DINO: Swin, BERT, deformable transformer."""
    import torch
    from transformers import (
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "image_size": 64,
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 2,
            "out_indices": [2, 3, 4],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(words),
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        d_model=32,  # what 32 groups of its normalisation divide
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=8,
        disable_custom_kernels=True,
    )
    model = GroundingDinoForObjectDetection(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The first boxes would all be 5 % of the picture; spread the heads' answers, so that boxes differ in size.
            if "bbox_embed" in name and name.endswith("layers.2.bias"):
                parameter.copy_(torch.tensor([0.0, 0.0, 1.5, 1.5]))
            elif "bbox_embed" in name and name.endswith("weight"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    processor = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    GroundingDinoProcessor(processor, tokenizer(words)).save_pretrained(folder)


def _write_pose(folder: Path, words: list[str], size: tuple[int, int]) -> None:
    """Shaped as ViTPose with the simple decoder: a heat map for each of 17 key points."""
    from transformers import VitPoseConfig, VitPoseForPoseEstimation, VitPoseImageProcessor

    backbone = {
        "model_type": "vitpose_backbone",
        "image_size": (64, 48),
        "patch_size": (8, 8),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "out_indices": [2],
    }
    keypoints: dict[str, Any] = {"num_labels": 17}
    config = VitPoseConfig(backbone_config=backbone, **keypoints)
    VitPoseForPoseEstimation(config).save_pretrained(folder)
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(folder)
