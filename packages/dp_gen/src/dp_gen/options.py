"""The flags of `train.py` and `generate.py`: the authors' flags with their names, types and defaults, and additions.

Every default of the package lives in this parser and nowhere else. Flags of one value are checked while parsing (exit
status 2, as argparse does); `training_flags` checks what needs several flags, or the files that they name.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dp_gen.data.layout import FolderLayout, require_files
from dp_gen.model.hub import BASE_MODEL, IMAGE_ENCODER, check_model_folders
from tbps_common.errors import DatasetError, InputError
from tbps_common.run.arguments import HelpFormatter, add_bad_images_flag, number, whole_number

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PRECISIONS = ("no", "fp16", "bf16")
LARGEST_SEED = 2**32 - 1
LEAST_RESOLUTION = 64  # three halvings of the latents, and the deepest attention still has a pixel

DENOISE_MASK_PROB = 0.73
"""Probability with which a batch's denoising loss is masked (hard-coded in the released code)."""

TRAIN_DESCRIPTION = """\
Train Diverse Person: Stable Diffusion 1.5 that follows a caption and one reference image per attribute.

The paper's command, run from packages/dp_gen:

  CUDA_VISIBLE_DEVICES=0,1 accelerate launch \\
    --mixed_precision=bf16 \\
    train.py \\
    --pretrained_model_hf runwayml/stable-diffusion-v1-5 \\
    --dataset_name {DATASET_PATH} \\
    --logging_dir {LOG_PATH} \\
    --output_dir {OUTPUT_PATH} \\
    --max_train_steps 30000 \\
    --num_train_epochs 30000 \\
    --train_batch_size 32 \\
    --lr 1e-5 \\
    --unet_lr_scale 1.0 \\
    --checkpointing_steps 200 \\
    --mixed_precision bf16 \\
    --keep_only_last_checkpoint \\
    --keep_interval 10000 \\
    --seed 42 \\
    --image_encoder_hf openai/clip-vit-large-patch14 \\
    --img_token_num 1 \\
    --MAX_REFERENCE_ATTRIBUTE_NUM 3 \\
    --resolution 128 \\
    --text_image_linking control \\
    --disable_flashattention \\
    --train_image_encoder \\
    --image_encoder_trainable_layers 2 \\
    --reference_attribute_types hair_uppercloth_bottomcloth \\
    --mask_loss \\
    --attribute_loc \\
    --attribute_loc_weight 1e-3 \\
    --attribute_localization_loss balanced_l1 \\
    --resume_from_checkpoint latest

A flag given twice keeps its last value, so a command can be adapted by appending to it.
The output folder receives checkpoint-<step>/ (accelerate's layout) and, at the end, the generation pipeline.
"""


def _resolution(text: str) -> int:
    value = whole_number(LEAST_RESOLUTION)(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8 (the VAE halves it three times), not {value}")
    return value


def _seed(text: str) -> int:
    value = whole_number(0)(text)
    if value > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST_SEED} (numpy accepts no larger one), not {value}")
    return value


def _image_tokens(text: str) -> int:
    if whole_number(1)(text) != 1:
        raise argparse.ArgumentTypeError(f"must be 1: the method has one token per reference image, not {text}")
    return 1


def _probability(text: str) -> float:
    value = number(0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {value:g}")
    return value


def build_parser(prog: str | None = None, description: str = TRAIN_DESCRIPTION) -> argparse.ArgumentParser:
    """The parser that training and generation share; generation adds a group of its own."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    _add_model_flags(parser)
    _add_training_flags(parser)
    _add_loss_flags(parser)
    _add_generation_flags(parser)
    _add_additions(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model (the authors' flags)")
    model.add_argument(
        "--pretrained_model_hf",
        default=BASE_MODEL,
        help="Stable Diffusion as a folder in diffusers' layout, or its name on the Hugging Face hub",
    )
    model.add_argument("--revision", help="hub revision of that model")
    model.add_argument(
        "--image_encoder_hf", default=IMAGE_ENCODER, help="CLIP for the reference images: a folder, or a hub name"
    )
    model.add_argument("--img_token_num", type=_image_tokens, default=1, help="tokens per reference image; only 1")
    model.add_argument(
        "--MAX_REFERENCE_ATTRIBUTE_NUM", type=whole_number(1), default=4, help="reference images per person, at most"
    )
    model.add_argument(
        "--resolution", type=_resolution, default=128, help="side of training, reference and generated images"
    )
    model.add_argument(
        "--text_image_linking", choices=("control",), default="control", help="how references enter the caption"
    )
    model.add_argument(
        "--activate_controller",
        "--freeze_controller",
        action="store_true",
        help="freeze the controller (the released name says the opposite of what it does)",
    )
    model.add_argument("--train_text_encoder", action="store_true", help="train the text encoder too")
    model.add_argument("--train_image_encoder", action="store_true", help="train the image encoder too")
    model.add_argument(
        "--image_encoder_trainable_layers",
        type=whole_number(0),
        default=0,
        help="train only the last K layers of the image encoder; 0 trains all of it",
    )
    model.add_argument("--load_model", help="start from these weights: a checkpoint folder or file, or a final folder")
    model.add_argument("--disable_flashattention", action="store_true", help="use only the other attention kernels")
    model.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="accepted; PyTorch's own fused attention is used, and captured layers stay captured",
    )


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("training (the authors' flags)")
    run.add_argument("--dataset_name", help="root of the training folder (its layout is in the README)")
    run.add_argument("--output_dir", default="log/fine_generator", help="checkpoints and the final pipeline")
    run.add_argument("--logging_dir", default="logs", help="folder of the trackers")
    run.add_argument(
        "--report_to", help="trackers such as tensorboard, wandb, all, none; default: tensorboard if installed"
    )
    run.add_argument("--seed", type=_seed, help="random seed; without it every run differs")
    run.add_argument("--train_batch_size", type=whole_number(1), default=16, help="samples per process")
    run.add_argument(
        "--num_train_epochs", type=whole_number(1), default=100, help="counts only without --max_train_steps"
    )
    run.add_argument("--max_train_steps", type=whole_number(1), help="optimizer updates of the whole run")
    run.add_argument(
        "--gradient_accumulation_steps", type=whole_number(1), default=1, help="batches per optimizer update"
    )
    run.add_argument(
        "--gradient_checkpointing", action="store_true", help="compute activations twice to save memory; same numbers"
    )
    run.add_argument("--lr", type=number(0), default=1e-4, help="learning rate")
    run.add_argument("--unet_lr_scale", type=number(0), default=1.0, help="learning-rate factor of the U-Net")
    run.add_argument(
        "--scale_lr", action="store_true", help="multiply --lr by accumulation, batch size and number of processes"
    )
    run.add_argument("--lr_scheduler", choices=SCHEDULES, default="constant", help="learning-rate schedule")
    run.add_argument(
        "--lr_warmup_steps", type=whole_number(0), default=500, help="warm-up; without effect for 'constant'"
    )
    run.add_argument("--adam_beta1", type=number(0, 1), default=0.9, help="first beta of AdamW")
    run.add_argument("--adam_beta2", type=number(0, 1), default=0.999, help="second beta of AdamW")
    run.add_argument(
        "--adam_weight_decay", type=number(0), default=1e-2, help="weight decay of AdamW, on every parameter"
    )
    run.add_argument("--adam_epsilon", type=number(0, above=True), default=1e-8, help="epsilon of AdamW")
    run.add_argument("--max_grad_norm", type=number(0, above=True), default=1.0, help="largest norm of the gradients")
    run.add_argument("--mixed_precision", choices=PRECISIONS, help="default: that of accelerate launch, otherwise no")
    run.add_argument("--checkpointing_steps", type=whole_number(1), default=500, help="updates between checkpoints")
    run.add_argument(
        "--resume_from_checkpoint", help="a checkpoint folder, or 'latest' (starts from scratch if there is none)"
    )
    run.add_argument("--keep_only_last_checkpoint", action="store_true", help="delete older checkpoints")
    run.add_argument("--keep_interval", type=whole_number(1), help="keep older checkpoints of every N-th update")
    run.add_argument(
        "--reference_attribute_types", help="attribute types to train on, joined by '_'; default: every type"
    )


def _add_loss_flags(parser: argparse.ArgumentParser) -> None:
    losses = parser.add_argument_group("losses (the authors' flags)")
    losses.add_argument("--mask_loss", action="store_true", help="denoising loss within the attributes' regions")
    losses.add_argument("--attribute_loc", action="store_true", help="localisation loss on the cross-attention")
    losses.add_argument("--attribute_loc_weight", type=number(0), default=0.01, help="weight of the localisation loss")
    losses.add_argument(
        "--attribute_localization_loss",
        choices=("balanced_l1",),
        default="balanced_l1",
        help="form of the localisation loss",
    )
    losses.add_argument("--attribute_loc_norm", action="store_true", help="divide attention maps by their maximum")
    losses.add_argument(
        "--loc_layers",
        "--loc_latyers",
        dest="loc_layers",
        type=int,
        choices=range(1, 8),
        default=5,
        help="U-Net stages that the localisation loss supervises, around the middle one (the released spelling is accepted)",
    )


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    generation = parser.add_argument_group("generation (the authors' flags; train.py reads none of them)")
    generation.add_argument("--inference_steps", type=whole_number(1), default=50, help="denoising steps")
    generation.add_argument("--guidance_scale", type=number(), default=5.0, help="scale of classifier-free guidance")
    generation.add_argument(
        "--num_images_per_description", type=whole_number(1), default=1, help="images per description"
    )
    generation.add_argument("--finetuned_model_path", help="trained weights: a final folder, a checkpoint, or a file")
    generation.add_argument(
        "--start_merge_step", type=int, default=0, help="references enter after this step; -1 from the first"
    )
    generation.add_argument("--test_description", help="caption, with <|image|> after each phrase with a reference")
    generation.add_argument(
        "--test_reference_attribute_folder", help="folder of references: 0, 1, ... as subfolders or as image files"
    )


def _add_additions(parser: argparse.ArgumentParser) -> None:
    ours = parser.add_argument_group("additions of this project (the defaults reproduce the released code)")
    ours.add_argument(
        "--mask_loss_prob", type=_probability, default=DENOISE_MASK_PROB, help="how often --mask_loss masks a batch"
    )
    ours.add_argument(
        "--seg_map_interpolation",
        choices=("bilinear", "nearest"),
        default="bilinear",
        help="how the mask is resized when a tall image is squeezed: bilinear blends segment ids at borders as released, nearest "
        "keeps them and is better for new trainings",
    )
    ours.add_argument(
        "--uncondition_prob",
        type=_probability,
        default=0.0,
        help="share of samples without caption and references; 0.1 is better for guidance",
    )
    ours.add_argument("--text_only_prob", type=_probability, default=0.0, help="share of samples without references")
    ours.add_argument("--attribute_appear_prob", type=_probability, default=1.0, help="chance of each reference")
    ours.add_argument("--dataloader_num_workers", type=whole_number(0), default=4, help="processes that load data")
    add_bad_images_flag(ours)
    ours.add_argument("--log_every", type=whole_number(1), default=10, help="updates between two reads of the losses")
    ours.add_argument("--same_noise_on_ranks", action="store_true", help="the same noise on every process, as released")
    ours.add_argument(
        "--scheduler_steps_per_process",
        action="store_true",
        help="advance --lr_scheduler once per process at every update, as released: with N processes it then ends after "
        "an N-th of the updates",
    )
    ours.add_argument("--allow_tf32", action="store_true", help="quicker float32 products on recent GPUs")
    ours.add_argument(
        "--compile", action="store_true", help="torch.compile the encoders, and the U-Net if nothing is captured in it"
    )
    ours.add_argument("--cache_dir", help="folder of the hub's downloads")
    ours.add_argument("--variant", help="variant of the hub's weight files, such as fp16")


def parse_args(argv: Sequence[str] | None = None, default: bool = False) -> argparse.Namespace:
    """Parse the flags of a training run.

    Args:
        argv: the words; None reads the command line.
        default: give every default and read nothing, as the released function does.
    """
    return build_parser().parse_args([] if default else argv)


def training_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a training, checked as far as that needs no model: a wrong path is reported within a second.

    Raises:
        DatasetError: files of the training folder are missing or damaged, or none of it is of the wanted types.
        InputError: the flags contradict each other, or the folder of a model is not one.
    """
    args = parse_args(argv)
    _check_training_flags(args)
    check_model_folders(args.pretrained_model_hf, args.image_encoder_hf)
    _check_training_folder(args)
    return args


def _check_training_flags(args: argparse.Namespace) -> None:
    if not args.dataset_name:
        raise InputError("--dataset_name is missing: name the root of a training folder (segment.py makes one)")
    if args.uncondition_prob + args.text_only_prob > 1:
        raise InputError(
            f"--uncondition_prob {args.uncondition_prob:g} and --text_only_prob {args.text_only_prob:g} together exceed "
            "1: lower one of them"
        )
    for flag in ("output_dir", "logging_dir"):
        path = Path(getattr(args, flag))
        if path.exists() and not path.is_dir():
            raise InputError(f"--{flag} {path} is a file: name a folder")
    if args.load_model and not Path(args.load_model).exists():
        raise InputError(f"--load_model {args.load_model} does not exist: check the path")


def _check_training_folder(args: argparse.Namespace) -> None:
    layout = FolderLayout(args.dataset_name, "train")
    require_files(layout)
    wanted = attribute_types(args)
    labels = Counter(segment["label"] for img_id in layout.ids for segment in layout.read_info(img_id)["segments"])
    if wanted is not None and labels and not wanted & set(labels):
        known = ", ".join(sorted(str(label) for label in labels))
        raise DatasetError(
            f"--reference_attribute_types {args.reference_attribute_types} names none of the types in {layout.root} "
            f"({known}): no reference would be trained"
        )


def attribute_types(args: argparse.Namespace) -> frozenset[str] | None:
    """The allow list of `--reference_attribute_types`; None allows every type."""
    text = args.reference_attribute_types
    if text is None or text == "all":
        return None
    return frozenset(name for name in text.split("_") if name)
