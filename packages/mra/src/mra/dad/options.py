"""The flags of `mra-dad` and its subcommands. Settings of the paper are marked so; all others are this project's."""

import argparse
from typing import Any

from mra.options import device, seed
from tbps_common.pipeline.stages import add_shard_flags
from tbps_common.run.arguments import HelpFormatter, add_bad_images_flag, number, whole_number

DESCRIPTION = """\
Make a synthetic pre-training set in the style of a target data set, as SDA was made for CUHK-PEDES:

  mra-dad finetune --out data/dad/model                        align a diffusion model with the training images
  mra-dad generate --controlnet data/dad/model/controlnet      20 pictures per training caption
  mra-dad filter                                               drop greyscale pictures and malformed persons
  mra-dad caption                                              describe every picture
  mra-dad regions                                              boxes and phrases; writes data/sda/sda_<a>_<b>.json
  python3 run.py --task "sda" --dist "f4" --output_dir "out/pre_sda"

Every stage reads and writes plain files, continues where it was stopped or killed when the same command is given again,
and takes --shard i/n to share its work among n machines. mra-dad-toy (tests/world) runs all of it on tiny networks.
"""

# Beside the paper's settings; see docs/dad.md.
DIFFUSION_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
POSE_MODEL = "usyd-community/vitpose-base-simple"
CAPTION_MODEL = "Salesforce/blip2-flan-t5-xl"
DETECTOR_MODEL = "IDEA-Research/grounding-dino-base"
CAPTION_PROMPT = "Describe the image in English"
VARIANTS = 20
HEIGHT, WIDTH = 384, 256
EPOCHS = 3
BOX_THRESHOLD = TEXT_THRESHOLD = 0.35
LEARNING_RATES = {"controlnet": 5e-6, "lora": 1e-4}
METHODS = tuple(LEARNING_RATES)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SCHEDULERS = ("model", "ddim", "dpm", "unipc")


class _Formatter(HelpFormatter):
    """Shows every default that is a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def build_parser() -> argparse.ArgumentParser:
    """The parser of `mra-dad`; `command` of its result is the subcommand's name."""
    parser = argparse.ArgumentParser(prog="mra-dad", description=DESCRIPTION, formatter_class=_Formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, short, description) in _COMMANDS.items():
        sub = commands.add_parser(name, help=short, description=description, formatter_class=_Formatter)
        add(sub)
    return parser


def _finetune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="data/dad/model", metavar="DIR", help="folder of everything that is written")
    add_data(parser)
    parser.add_argument(
        "--model", default=DIFFUSION_MODEL, help="Stable Diffusion 1.x or 2.x: hub id, or folder in diffusers' layout"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="controlnet",
        help="controlnet (paper): a trainable copy of the encoder, fed with a white picture, next to the frozen model; "
        "lora: low-rank matrices in the attention layers, light",
    )
    parser.add_argument(
        "--lora_rank", type=whole_number(1), default=16, help="rank of the LoRA matrices (--method lora)"
    )
    add_size(parser)
    group = parser.add_argument_group("training (epochs are the paper's; the paper does not state the others)")
    group.add_argument("--epochs", type=whole_number(1), default=EPOCHS, help="passes over the captions (paper: 3)")
    group.add_argument(
        "--lr",
        type=number(0, above=True),
        help="learning rate (default: {controlnet:g} for controlnet, {lora:g} for lora)".format(**LEARNING_RATES),
    )
    group.add_argument(
        "--warmup", type=whole_number(0), default=500, help="steps over which the learning rate rises to --lr"
    )
    group.add_argument("--batch_size", type=whole_number(1), default=8, help="pairs at a time, per process")
    group.add_argument("--accumulate", type=whole_number(1), default=1, help="batches of --batch_size per step")
    group.add_argument("--weight_decay", type=number(0), default=0.01, help="weight decay of AdamW")
    group.add_argument("--clip", type=number(0), default=1.0, help="clip the gradient to this norm; 0: no clipping")
    group.add_argument(
        "--empty_prompts",
        type=number(0, 1),
        default=0.0,
        help="share of the captions that are replaced by the empty text",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, about a third more time")
    group.add_argument("--seed", type=seed, default=42, help="random seed of the order, the noise and the time steps")
    _add_machine(parser)
    parser.add_argument("--num_workers", type=whole_number(0), default=4, help="data-loading workers per process")
    parser.add_argument(
        "--save_every", type=whole_number(1), default=500, help="steps between two checkpoints (last.pth)"
    )
    parser.add_argument("--log_every", type=whole_number(1), default=50, help="steps between two log lines")
    add_bad_images_flag(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser)
    add_data(parser)
    parser.add_argument(
        "--model",
        default=DIFFUSION_MODEL,
        help="any text-to-image model of diffusers: hub id, or folder in its layout (with --controlnet, the model "
        "that was fine-tuned)",
    )
    parser.add_argument("--controlnet", metavar="DIR", help="folder that mra-dad finetune wrote, or a hub id")
    parser.add_argument("--lora", metavar="DIR", help="folder that mra-dad finetune --method lora wrote, or a hub id")
    add_size(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--variants",
        type=whole_number(1),
        default=VARIANTS,
        help="pictures per caption: one of the caption itself, the others of augmented ones (paper: 20)",
    )
    group.add_argument("--captions", type=whole_number(1), metavar="N", help="use the first N captions (default: all)")
    group.add_argument(
        "--synonyms", metavar="FILE", help="JSON table of the words' synonyms in the place of WordNet (see the README)"
    )
    group = parser.add_argument_group("sampling (the paper does not state it; the defaults are diffusers')")
    group.add_argument("--steps", type=whole_number(1), default=50, help="denoising steps")
    group.add_argument("--guidance", type=number(0), default=7.5, help="scale of classifier-free guidance")
    group.add_argument("--control_scale", type=number(0), default=1.0, help="weight of the ControlNet")
    group.add_argument("--negative_prompt", default="", help="negative prompt: guidance leads away from it")
    group.add_argument("--scheduler", choices=SCHEDULERS, default="model", help="model: the one the model comes with")
    group.add_argument(
        "--seed",
        type=seed,
        default=42,
        help="random seed of prompts and noise; each picture's own follows from its name",
    )
    group.add_argument("--quality", type=whole_number(1), default=95, help="quality of the JPEG files, up to 100")
    _add_stage(parser, batch_size=8)


def _filter(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser)
    group = parser.add_argument_group("greyscale (thresholds are this project's: the paper does not state its own)")
    group.add_argument(
        "--min_chroma",
        type=number(0),
        default=8.0,
        help="drop a picture whose pixels' channels differ less than this on average (0 to 255); 0 keeps all",
    )
    group.add_argument(
        "--min_chroma_spread",
        type=number(0),
        default=4.0,
        help="drop a picture whose channel differences vary less than this (standard deviation): toned greyscale",
    )
    group = parser.add_argument_group("persons (the paper uses OpenPose; here a pose model of transformers)")
    group.add_argument("--pose_model", default=POSE_MODEL, help="ViTPose: hub id or folder; none: skip this check")
    group.add_argument(
        "--keypoint_score", type=number(0, 1), default=0.3, help="lowest score at which a key point counts"
    )
    group.add_argument(
        "--min_keypoints", type=whole_number(0), default=8, help="fewest key points of a person, out of 17"
    )
    group.add_argument(
        "--min_extent",
        type=number(0, 1),
        default=0.4,
        help="smallest vertical extent of the key points, as a share of the picture",
    )
    group.add_argument(
        "--any_order",
        action="store_true",
        help="keep persons whose head, shoulders, hips and ankles are not in this order",
    )
    _add_stage(parser, batch_size=32)


def _caption(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser)
    parser.add_argument("--model", default=CAPTION_MODEL, help="BLIP-2 of transformers: hub id or folder")
    parser.add_argument("--prompt", default=CAPTION_PROMPT, help="prompt for the model (default: the paper's)")
    parser.add_argument("--max_tokens", type=whole_number(1), default=50, help="longest caption")
    parser.add_argument("--beams", type=whole_number(1), default=1, help="beams of the search; 1: greedy decoding")
    _add_stage(parser, batch_size=16)


def _regions(parser: argparse.ArgumentParser) -> None:
    _add_folders(parser)
    parser.add_argument(
        "--sda", default="data/sda", metavar="DIR", help="folder of the JSON files that --task sda reads"
    )
    parser.add_argument("--model", default=DETECTOR_MODEL, help="Grounding DINO of transformers: hub id or folder")
    parser.add_argument(
        "--box_threshold", type=number(0, 1), default=BOX_THRESHOLD, help="lowest score of a box (paper: 0.35)"
    )
    parser.add_argument(
        "--text_threshold",
        type=number(0, 1),
        default=TEXT_THRESHOLD,
        help="lowest score of a phrase's words (paper: 0.35)",
    )
    group = parser.add_argument_group("box filter (the paper has one and does not state its rule)")
    group.add_argument(
        "--min_side", type=number(0, 1), default=0.02, help="least width and height of a box, as a share of the picture"
    )
    group.add_argument(
        "--overlap",
        type=number(0, 1, above=True),
        default=0.8,
        help="if two boxes with the same phrase overlap more than this (intersection over union), only the one with the higher score is kept",
    )
    parser.add_argument(
        "--pack",
        action="store_true",
        help="only write the JSON files, once all shards are done (a run without --shard does it by itself)",
    )
    _add_stage(parser, batch_size=8)


def add_data(parser: Any) -> None:
    parser.add_argument(
        "--train_file",
        default="data/finetune/cuhk_train.json",
        metavar="FILE",
        help="pairs of the target data set, as tbps-data convert --to finetune writes them",
    )
    parser.add_argument("--image_root", default="images/CUHK-PEDES/imgs", metavar="DIR", help="its images")


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", default="data/dad", metavar="DIR", help="folder of the stages' JSON lines")
    parser.add_argument("--images", default="images/SDA", metavar="DIR", help="folder of the generated pictures")


def add_size(parser: argparse.ArgumentParser, height: int = HEIGHT, width: int = WIDTH) -> None:
    parser.add_argument("--height", type=whole_number(8), default=height, help="height of the pictures, in pixels")
    parser.add_argument("--width", type=whole_number(8), default=width, help="width of the pictures, in pixels")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="precision of the networks that are not trained; auto: 16 bits on a GPU if the model is known to work in it, else fp32",
    )


def _add_stage(parser: argparse.ArgumentParser, batch_size: int) -> None:
    group = parser.add_argument_group("how the work is done")
    add_shard_flags(group)
    group.add_argument("--batch_size", type=whole_number(1), default=batch_size, help="pictures at a time")
    _add_machine(parser)


_COMMANDS = {
    "finetune": (
        _finetune,
        "align a diffusion model with the training images",
        "Fine-tune a text-to-image model on the pairs of a training set. Writes DIR/controlnet or DIR/lora in diffusers'\n"
        "layout, log.jsonl and last.pth; the same command continues where it was stopped, with the same numbers.\n"
        "Several GPUs: torchrun --nproc_per_node 4 -m mra.dad finetune ...",
    ),
    "generate": (
        _generate,
        "make pictures of the training captions",
        "Make pictures of every caption and of augmented forms of it: c_<a>_<b>/<caption>_<variant>.jpg. A picture's\n"
        "noise depends on --seed, caption and variant alone, not on batch, shard or an interruption.",
    ),
    "filter": (
        _filter,
        "drop greyscale pictures and malformed persons",
        "Judge every generated picture. What is dropped is listed with its reason and the values it was judged by in\n"
        "filtered.jsonl.dropped.jsonl; no picture is deleted.",
    ),
    "caption": (_caption, "describe every picture that was kept", "Write one caption per picture with BLIP-2."),
    "regions": (
        _regions,
        "find boxes and phrases, write the SDA files",
        "Find the regions that a caption speaks of, and write the JSON files that --task sda reads.\n"
        "With --shard, give all shares, then mra-dad regions --pack.",
    ),
}
