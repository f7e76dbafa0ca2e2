"""The flags of `train.py` and `cli.py` (evaluation), with all their defaults.

Nothing heavy is imported: `--help` answers at once, and a wrong flag is reported before torch is loaded. Flags of
`transformers.TrainingArguments` are passed on as they are; `diana.trainer_flags` reads them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from diana.data.annotations import TRAIN_DATASETS
from diana.data.text import CAPTION_BUDGETS
from diana.model.config import ATTENTION, DROP_PATH_SCHEDULES, SIM_TYPES
from diana.trainer_flags import asks_for_cpu, has_unknown, read_trainer_flags, take_flag
from tbps_common.errors import InputError
from tbps_common.run.arguments import (
    HelpFormatter,
    add_bad_images_flag,
    add_require_published_flag,
    add_tf32_flag,
    number,
    whole_number,
)

EVAL_DATASETS = ("chatpedes",)
MODES = ("global", "local", "all")
VERSION = "customized"

TRAIN_DESCRIPTION = """\
Train DiaNA. The paper's two stages, run from packages/diana/DiaNA/train:

  bash shell/pretrain.sh
  bash shell/finetune.sh

Both call this program; what follows the script's name is appended to its flags, and the last value of a flag counts:

  bash shell/finetune.sh --num_train_epochs 2 --learning_rate 2e-5

One process: python main/train/train.py FLAGS; several: torchrun --nproc_per_node=N main/train/train.py FLAGS. A single
argument FILE.json is a file of flags. Booleans are given as --flag True.
"""
TRAIN_EPILOG = """\
Every flag of transformers.TrainingArguments is accepted too: --output_dir, --per_device_train_batch_size,
--num_train_epochs, --max_steps, --learning_rate, --weight_decay, --warmup_steps, --lr_scheduler_type, --bf16,
--gradient_accumulation_steps, --dataloader_num_workers, --save_strategy, --save_steps, --save_total_limit,
--logging_steps, --seed, --resume_from_checkpoint, --deepspeed, --report_to, ...; names that newer versions of
transformers dropped (--evaluation_strategy, --no_cuda, --warmup_ratio, ...) keep their meaning.

--deepspeed FILE uses DeepSpeed if it is installed and several GPUs take part. Otherwise the learning-rate schedule and
the clipping of FILE are computed here, without ZeRO; --deepspeed "" ignores the file, and --lr_scheduler_type
applies.
"""
EVAL_DESCRIPTION = """\
Evaluate DiaNA checkpoints on the test dialogues. Run from packages/diana/DiaNA/eval:

  bash shell/eval.sh
  bash shell/eval.sh --mode all --turn_limit 1 2 3 4 5 -1

Prints one table per checkpoint and turn limit (-1: whole dialogues). With --output_dir it also writes metrics.json,
evaluation_*.json, ranked lists, and, for several turn limits, the curve of R@1 over the rounds of the dialogue.
"""


class TrainOptions(argparse.Namespace):
    """DiaNA's own flags of `train.py`."""

    vision_pretrained: str | None
    llama_pretrained: str | None
    pretrained: str | None
    enable_refiner: bool
    enable_sdm: bool
    num_query: int
    sim_type: str
    freeze_model: bool
    freeze_vision_model: bool
    freeze_llama: bool
    unfreeze_llama_head: bool
    unfreeze_llama_projection: bool
    use_vision_lora: int
    use_llama_lora: int
    use_custom_trainer: bool
    drop_path_rate: float
    dataset_name: str
    dataset_config_path: str
    split: str
    max_seq_length: int
    mask_probability: float
    enable_random_turn: bool
    force_image_size: list[int]
    pad_to_max_length: bool
    turn_limit: int
    version: str
    overwrite_output_dir: bool
    config_dir: str
    init_from_scratch: bool
    attn_implementation: str
    grad_checkpointing: str
    drop_path_schedule: str
    caption_budget: str
    length_grouping: bool
    seed_per_rank: bool
    bad_images: str
    device: str

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of `--force_image_size`; one number is a square."""
        return self.force_image_size[0], self.force_image_size[-1]


class EvalOptions(argparse.Namespace):
    """The flags of the evaluation."""

    dataset: list[str]
    dataset_config_path: str
    split: str
    pretrained: list[str]
    num_workers: int
    seed: int
    batch_size: int
    max_seq_length: int
    turn_limit: list[int]
    version: str
    mode: str
    output_dir: str
    device: str
    dtype: str
    sim_dtype: str
    text_batch_size: int
    pictures: int
    require_published: float | None
    tf32: bool


def boolean(text: str) -> bool:
    """argparse type: `True`, `False` and their usual spellings."""
    lowered = text.strip().lower()
    if lowered in ("true", "t", "yes", "y", "1"):
        return True
    if lowered in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expects True or False, not {text!r}")


def turn_limit(text: str) -> int:
    """argparse type: -1 for whole dialogues, or how many rounds."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects a whole number, not {text!r}") from None
    if value == 0 or value < -1:
        raise argparse.ArgumentTypeError(f"must be -1 (all rounds) or at least 1, not {value}")
    return value


def build_train_parser() -> argparse.ArgumentParser:
    """The parser of `train.py`, without the flags of `transformers.TrainingArguments`."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=TRAIN_DESCRIPTION,
        epilog=TRAIN_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model (the authors' flags)")
    add = model.add_argument
    add("--vision_pretrained", metavar="PATH", help="Swin Transformer v2: folder, or name on the Hugging Face hub")
    add("--llama_pretrained", metavar="PATH", help="Llama: folder or hub name; the tokenizer comes from there too")
    add("--pretrained", metavar="PATH", help="DiaNA checkpoint to start from, instead of the two above")
    _switch(model, "--enable_refiner", False, "adaptive attribute refiner and its loss")
    _switch(model, "--enable_sdm", False, "similarity-distribution matching losses")
    add("--num_query", type=whole_number(1), default=16, help="attribute queries of the refiner")
    add("--sim_type", choices=SIM_TYPES, default="avg", help="how the similarities of the attributes are combined")
    _switch(model, "--freeze_model", False, "train only what is unfrozen or added")
    _switch(model, "--freeze_vision_model", False, "do not train the image tower")
    _switch(model, "--freeze_llama", False, "do not train the language tower")
    _switch(model, "--unfreeze_llama_head", False, "accepted; the model has no such head")
    _switch(model, "--unfreeze_llama_projection", False, "train the text projection although the model is frozen")
    add("--use_vision_lora", type=whole_number(0), default=0, help="accepted; the released code ignores it")
    add("--use_llama_lora", type=whole_number(0), default=0, help="rank of low-rank adapters of Llama; 0: none")
    _switch(model, "--use_custom_trainer", False, "layer-wise learning rates (VIT_LAYER_DECAY_RATE, ...)")
    add("--drop_path_rate", type=number(0, 1), default=0.0, help="stochastic depth of the image tower")

    data = parser.add_argument_group("data (the authors' flags)")
    add = data.add_argument
    add("--dataset_name", default="flickr30k", metavar="{mals,chatpedes}", help="data set")
    add(
        "--dataset_config_path",
        default="configs/dataset_config.yaml",
        metavar="FILE",
        help="YAML file that lists the data sets",
    )
    add("--split", default="train", help="which annotations: <split>_annotation of the data set")
    add("--max_seq_length", type=whole_number(8), default=80, help="tokens per text; words per caption")
    add("--mask_probability", type=number(0, 1.0000001), default=0.0, help="probability of masking a token")
    _switch(data, "--enable_random_turn", False, "keep a random number of first rounds of each dialogue")
    add("--force_image_size", type=whole_number(1), nargs="+", default=[224], metavar="PIXELS", help="height and width")
    _switch(data, "--pad_to_max_length", False, "pad every text to --max_seq_length")
    add("--turn_limit", type=turn_limit, default=-1, help="keep the first rounds of each dialogue; -1: all")
    add("--version", default="v0", metavar="customized", help="dialogue template; only 'customized' exists")
    _switch(data, "--overwrite_output_dir", False, "start over even if --output_dir holds a checkpoint")

    ours = parser.add_argument_group("additions of this project (the defaults reproduce the released code)")
    add = ours.add_argument
    add("--config_dir", default="configs", metavar="DIR", help="folder of config.json, the sizes of a new model")
    _switch(ours, "--init_from_scratch", False, "random towers; no backbone is read")
    add("--attn_implementation", choices=ATTENTION, default="auto", help="attention kernel of Llama")
    add(
        "--grad_checkpointing",
        choices=("auto", "on", "off"),
        default="on",
        help="recompute activations in the backward pass: less memory, a third more work; auto: on GPUs below 80 GB",
    )
    add(
        "--drop_path_schedule",
        choices=DROP_PATH_SCHEDULES,
        default="constant",
        help="same rate in every block (released), or growing from 0",
    )
    add(
        "--caption_budget",
        choices=CAPTION_BUDGETS,
        default="caption",
        help="--max_seq_length counts the tokens of the caption alone, or those of the system text too (released: captions are cut off)",
    )
    _switch(ours, "--length_grouping", False, "batches of dialogues of similar length")
    _switch(ours, "--seed_per_rank", False, "each process draws its own drop-path noise")
    add_bad_images_flag(ours)
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: the GPU if there is one")
    return parser


def _switch(group: argparse._ArgumentGroup, name: str, default: bool, help: str) -> None:
    group.add_argument(name, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def parse_train_flags(argv: Sequence[str]) -> tuple[TrainOptions, list[str]]:
    """DiaNA's flags, checked one by one, and the words that are left for `transformers.TrainingArguments`.

    Raises:
        InputError: a JSON file of flags cannot be read, or a flag is unknown.
        SystemExit: status 2 after argparse's message, 0 after `--help`.
    """
    parser = build_train_parser()
    options, words = parser.parse_known_args(expand_json(list(argv)), namespace=TrainOptions())
    if len(options.force_image_size) > 2:
        parser.error(f"argument --force_image_size: expects one or two numbers, not {len(options.force_image_size)}")
    if asks_for_cpu(words):
        options.device = "cpu"
    if has_unknown(words):  # probably a typing error, which is reported before anything else is looked at
        read_trainer_flags(["--output_dir", "unused", *take_flag(words, "deepspeed")[0]], cpu=True)
    if options.dataset_name not in TRAIN_DATASETS:
        parser.error(f"argument --dataset_name: choose from {', '.join(TRAIN_DATASETS)}, not {options.dataset_name!r}")
    if options.version != VERSION:
        parser.error(f"argument --version: only {VERSION!r} exists, not {options.version!r}")
    return options, words


def expand_json(argv: list[str]) -> list[str]:
    """A single argument `FILE.json` stands for the flags in the file.

    Raises:
        InputError: the file is absent, or not a JSON object.
    """
    if len(argv) != 1 or not argv[0].endswith(".json"):
        return argv
    file = Path(argv[0])
    try:
        flags = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give a JSON file of flags") from error
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}): correct it") from error
    if not isinstance(flags, dict):
        raise InputError(f'{file} must hold one object of flags, such as {{"num_query": 16}}')
    words: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        if isinstance(value, dict):  # lr_scheduler_kwargs and its like: TrainingArguments reads JSON text
            words += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words


def build_eval_parser() -> argparse.ArgumentParser:
    """The parser of the evaluation."""
    parser = argparse.ArgumentParser(
        prog="cli.py", description=EVAL_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    theirs = parser.add_argument_group("the authors' flags")
    add = theirs.add_argument
    add("--dataset", nargs="+", default=["chatpedes"], choices=EVAL_DATASETS, help="data sets")
    add(
        "--dataset_config_path",
        default="configs/dataset_config.yaml",
        metavar="FILE",
        help="YAML file that lists the data sets",
    )
    add("--split", default="test", help="which annotations: <split>_annotation of the data set")
    add(
        "--pretrained", nargs="+", default=[""], metavar="DIR", help="checkpoint folders, evaluated one after the other"
    )
    add("--num_workers", type=whole_number(0), default=4, help="processes that load images")
    add("--seed", type=whole_number(0), default=0, help="random seed of torch")
    add("--batch_size", type=whole_number(1), default=64, help="images encoded at once")
    add("--max_seq_length", type=whole_number(8), default=80, help="tokens per dialogue; ChatPedes needs 400")
    add(
        "--turn_limit", type=turn_limit, nargs="+", default=[-1], help="number of rounds used; several numbers: a sweep"
    )
    add("--version", default="", help="dialogue template; only 'customized' exists")
    add("--mode", choices=MODES, default="global", help="similarity of whole texts, of attributes too, or their sum")
    add("--output_dir", default="", metavar="DIR", help="where the results are written; empty: nowhere")
    ours = parser.add_argument_group("additions of this project")
    add = ours.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--dtype", choices=("checkpoint", "fp32", "bf16"), default="checkpoint", help="precision of the model")
    add(
        "--sim_dtype",
        choices=("fp32", "native"),
        default="fp32",
        help="precision of the similarities; native: the model's",
    )
    add("--text_batch_size", type=whole_number(1), default=256, help="dialogues encoded at once")
    add("--pictures", type=whole_number(0), default=6, help="queries in the ranked list; 0: no pictures")
    add_tf32_flag(ours)
    add_require_published_flag(ours)
    return parser


def parse_eval_flags(argv: Sequence[str]) -> EvalOptions:
    """Flags of the evaluation, checked.

    Raises:
        InputError: no checkpoint is given.
        SystemExit: status 2 after argparse's message, 0 after `--help`.
    """
    parser = build_eval_parser()
    options = parser.parse_args(list(argv), namespace=EvalOptions())
    if options.version not in ("", VERSION):
        parser.error(f"argument --version: only {VERSION!r} exists, not {options.version!r}")
    if not all(options.pretrained):
        raise InputError("--pretrained is missing: give the folder of a DiaNA checkpoint")
    return options
