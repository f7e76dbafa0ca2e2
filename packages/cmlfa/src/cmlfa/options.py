"""The flags of every command: those of `train.py` as a dataclass, from which their parser is made, then the other parsers.

The authors' flags have their names, types and defaults. A flag of one value is checked while it is parsed (exit status
2, as argparse does); `check_training_flags` checks what needs several flags at once.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from cmlfa.model.settings import ADDED, AUTHORS, ModelSettings, flag, image_size, problem_of
from tbps_common.errors import InputError
from tbps_common.run.arguments import (
    BAD_IMAGES,
    HelpFormatter,
    add_require_published_flag,
    add_tf32_flag,
    number,
    whole_number,
)
from tbps_common.search.options import add_gallery_flags, add_hit_flags

DATASET_NAMES = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
OPTIMIZERS = ("SGD", "Adam", "AdamW")
SCHEDULES = ("step", "exp", "poly", "cosine", "linear")
WARMUP_METHODS = ("linear", "constant")
SAMPLERS = ("random", "identity")

RUN = "run (the authors' flags)"
SOLVER = "optimisation (the authors' flags)"
DATA = "data (the authors' flags)"

DESCRIPTION = """\
Train CMLFA on CUHK-PEDES, ICFG-PEDES or RSTPReid.

The paper's command, run from packages/cmlfa:

  CUDA_VISIBLE_DEVICES=0 \\
  python train.py \\
  --name cmlfa \\
  --img_aug \\
  --batch_size 64 \\
  --MLM \\
  --loss_names 'sdm+mlm+id+itc' \\
  --dataset_name 'CUHK-PEDES' \\
  --root_dir 'your dataset root dir' \\
  --num_epoch 150 \\
  --id_loss_weight 0.5 \\
  --mlm_loss_weight 0.5

If a flag is given twice, its last value counts, so a command can be adapted by appending to it.
The run directory <output_dir>/<dataset_name>/<date>_<time>_<name> receives configs.yaml, train_log.txt, TensorBoard
events, best.pth (best R1) and last.pth (the state from which --resume continues).
Several GPUs: torchrun --nproc_per_node=N train.py ... (each process takes its own batch and computes its own
losses, so N processes of 64 are not one batch of 64*N).
"""
TEST_DESCRIPTION = """\
Evaluate a trained model on the test split of its data set.

  python test.py --config_file 'path/to/model_dir/configs.yaml'

Prints the table of text-to-image retrieval and writes evaluation.json, cmc.png, ranked_list.png and test_log.txt into
the run directory. On a data set other than the training one (zero-shot): --dataset_name ICFG-PEDES --root_dir ... With --lfa_attention batch (the released code) the features depend on the batch they are computed in,
so the result depends on --test_batch_size.
"""
VISUALIZE_DESCRIPTION = """\
Draw the ranked list of one caption of the test split, or of your own sentence:

  python visualize.py --config_file 'path/to/model_dir/configs.yaml' --query_idx 3900
  python visualize.py --config_file 'path/to/model_dir/configs.yaml' --caption "a woman in a red coat"

The picture is a row: the caption's own image (not for your own sentence), then the best images from left to right,
framed green if they show the right person and red if not.
"""
INDEX_DESCRIPTION = """\
Compute the features of all images in a folder once, for cmlfa-search:

  cmlfa-index --config_file RUN/configs.yaml --images FOLDER --out people.lance

A gallery that exists is brought up to date with the folder: see tbps-index --help.
"""
SEARCH_DESCRIPTION = """\
Find the images of a gallery that match a sentence, best first:

  cmlfa-search --config_file RUN/configs.yaml --gallery people.lance --text "a man with a red backpack"
"""


def optimizer_name(text: str) -> str:
    """The optimizer's name in any case: the authors' help text says `Adamw`, their code expects `AdamW`."""
    for name in OPTIMIZERS:
        if text.lower() == name.lower():
            return name
    raise argparse.ArgumentTypeError(f"must be one of {', '.join(OPTIMIZERS)}, not {text!r}")


def run_name(text: str) -> str:
    """A run name is the end of a folder's name."""
    if re.search(r"[/\\\0]", text):
        raise argparse.ArgumentTypeError(f"becomes part of a folder's name and cannot hold a path separator: {text!r}")
    return text


_run, _model, _solver, _data, _added = (partial(flag, group=group) for group in (RUN, AUTHORS, SOLVER, DATA, ADDED))


@dataclass
class Options(ModelSettings, argparse.Namespace):
    """The flags of `train.py`, with those of the model; the only place of their defaults."""

    name: str = _run("baseline", "name of the run, end of its folder's name", type=run_name)
    output_dir: str = _run("logs", "root of the run directories")
    log_period: int = _run(100, "iterations between two log lines", type=whole_number(1))
    eval_period: int = _run(1, "epochs between two evaluations", type=whole_number(1))
    val_dataset: str = _run(
        "test",
        "split evaluated during training: 'val' is the validation split, anything else the test split "
        "(the released recipe selects its best epoch on the test split)",
    )
    resume: bool = _run(False, "continue an interrupted run; alone: the newest run of --name")
    resume_ckpt_file: str = _run("", "checkpoint to continue from, together with --resume")
    local_rank: int = _run(
        0,
        "GPU of this process under an old launcher; torchrun's LOCAL_RANK takes precedence",
        names=("--local_rank", "--local-rank"),
        type=whole_number(0),
    )
    training: bool = _run(True, "mark the flags as those of a test", names=("--test",))

    img_aug: bool = _model(False, "augment training images (flip, pad and crop, erase)")
    masked_token_rate: float = _model(0.8, "accepted; the released code ignores it", type=float)
    masked_token_unchanged_rate: float = _model(0.1, "accepted; the released code ignores it", type=float)
    lr_factor: float = _model(
        5.0, "learning-rate factor of the cross-modal modules, the classifier and the MLM head", type=number(0)
    )
    MLM: bool = _model(False, "load captions with masked tokens; needed by the loss 'mlm'")

    optimizer: str = _solver("Adam", "optimizer (Adam uses eps 1e-3)", type=optimizer_name, metavar="{SGD,Adam,AdamW}")
    lr: float = _solver(1e-5, "base learning rate", type=number(0))
    bias_lr_factor: float = _solver(2.0, "learning-rate factor of the biases", type=number(0))
    momentum: float = _solver(0.9, "momentum of SGD", type=number(0))
    weight_decay: float = _solver(4e-5, "weight decay of the weights", type=number(0))
    weight_decay_bias: float = _solver(0.0, "weight decay of the biases", type=number(0))
    alpha: float = _solver(0.9, "first beta of Adam", type=number(0, 1))
    beta: float = _solver(0.999, "second beta of Adam", type=number(0, 1))
    num_epoch: int = _solver(60, "epochs of the whole run", type=whole_number(1))
    milestones: tuple[int, ...] = _solver((20, 50), "epochs of the step schedule", type=whole_number(0), nargs="+")
    gamma: float = _solver(0.1, "factor of the step schedule at each milestone", type=number())
    warmup_factor: float = _solver(0.1, "learning-rate factor of the first epoch", type=number(0))
    warmup_epochs: int = _solver(5, "epochs of warm-up", type=whole_number(0))
    warmup_method: str = _solver("linear", "shape of the warm-up", choices=WARMUP_METHODS)
    lrscheduler: str = _solver("cosine", "schedule after the warm-up", choices=SCHEDULES)
    target_lr: float = _solver(0, "last learning rate of cosine and poly", type=number(0))
    power: float = _solver(0.9, "power of exp and poly", type=number())

    dataset_name: str = _data("CUHK-PEDES", "data set", choices=DATASET_NAMES)
    sampler: str = _data(
        "random",
        "random: every caption once per epoch; identity: --num_instance captions of each person in a batch",
        choices=SAMPLERS,
    )
    num_instance: int = _data(4, "captions per person (identity sampler)", type=whole_number(1))
    root_dir: str = _data("./data", "folder that holds the data set's folder")
    batch_size: int = _data(128, "batch size of training, and of evaluation during training", type=whole_number(1))
    test_batch_size: int = _data(512, "batch size of test.py", type=whole_number(1))
    num_workers: int = _data(8, "processes that load the data", type=whole_number(0))

    clean_captions: bool = _added(
        False,
        "with --MLM: train SDM, ITC and ID on the unmasked captions (paper), not on the masked ones (released code)",
    )
    seed: int = _added(1, "seed of the first process; process r uses seed+r", type=whole_number(0))
    bad_images: str = _added(
        "stop",
        "a training image that cannot be read ends the run, or the next sample takes its place (they are counted)",
        names=("--bad_images", "--bad-images"),
        choices=BAD_IMAGES,
    )
    trust_checkpoint: bool = _added(
        False,
        "read a checkpoint that only Python's pickle can read; such a file can run any code, so only use this for "
        "files whose source you trust",
        names=("--trust_checkpoint", "--trust-checkpoint"),
    )

    @property
    def validation_split(self) -> str:
        """The split evaluated during training, `val` or `test`."""
        return "val" if self.val_dataset == "val" else "test"


_OPTIONS = {option.name: option for option in fields(Options)}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `train.py`; it fills an `Options`."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False)
    groups = {title: parser.add_argument_group(title) for title in (RUN, AUTHORS, SOLVER, DATA, ADDED)}
    for option in _OPTIONS.values():
        _add(groups[option.metadata["group"]], option.name, default=option.default)
    return parser


def _add(group: Any, name: str, **changes: Any) -> None:
    """Add the flag of an option to a parser; `changes` override its settings."""
    settings = {**_OPTIONS[name].metadata["argparse"], **changes}
    names = settings.pop("names", (f"--{name}",))
    if isinstance(_OPTIONS[name].default, bool):
        settings["action"] = "store_false" if _OPTIONS[name].default else "store_true"
    group.add_argument(*names, dest=name, **settings)


def get_args(argv: Sequence[str] | None = None) -> Options:
    """Parse the flags of a training run; `argv=[]` gives every default, `None` the command line."""
    parser = build_parser()
    options = parser.parse_args(argv, Options())
    options.milestones = tuple(options.milestones)
    try:  # one word or two
        options.img_size = image_size(" ".join(map(str, options.img_size)))
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --img_size: {error}")
    return options


def default_options() -> dict[str, Any]:
    """Every flag with its default."""
    return vars(Options())


def flag_problem(name: str, value: Any) -> str | None:
    """Why `value` cannot be the value of flag `name`, or None; used for values that come from a file."""
    return problem_of(_OPTIONS[name], value) if name in _OPTIONS else None


def check_training_flags(options: Options) -> None:
    """Refuse combinations of flags that cannot be trained, before anything is loaded or written.

    Raises:
        InputError: one sentence naming the flags and the remedy.
    """
    if not options.training:
        raise InputError(
            "--test asks for an evaluation, which train.py does not do: run test.py --config_file "
            "<run directory>/configs.yaml"
        )
    if "mlm" in options.losses and not options.MLM:
        raise InputError(
            f"--loss_names {options.loss_names} contains mlm, which needs the masked captions of --MLM: add --MLM, or "
            "remove mlm from --loss_names"
        )
    if options.sampler == "identity" and options.batch_size % options.num_instance:
        raise InputError(
            f"--batch_size {options.batch_size} is not a multiple of --num_instance {options.num_instance}, as the "
            "identity sampler needs"
        )
    if list(options.milestones) != sorted(options.milestones):
        raise InputError(f"--milestones {' '.join(map(str, options.milestones))} must be in ascending order")
    if options.resume_ckpt_file and not options.resume:
        raise InputError(f"--resume_ckpt_file {options.resume_ckpt_file} has no effect without --resume: add --resume")


# The commands that start from a trained model: these of its flags can be given again, and have no default there.
OVERRIDES = {
    "device": "where to compute",
    "precision": "precision of the weights",
    "dataset_name": "data set to test on",
    "root_dir": "folder that holds the data set's folder",
    "test_batch_size": "images or captions encoded at once",
    "num_workers": "processes that load the data",
}


def test_parser() -> argparse.ArgumentParser:
    """The parser of `test.py`."""
    parser = _parser_of_a_run(None, TEST_DESCRIPTION, "dataset_name", "root_dir", "test_batch_size", "num_workers")
    parser.add_argument("--i2t", action="store_true", help="evaluate image-to-text retrieval too")
    parser.add_argument(
        "--report_dir",
        help="where to write the results (default: the run directory; for a data set other than the training one, a "
        "folder of that name in the run directory)",
    )
    add_tf32_flag(parser)
    add_require_published_flag(parser)
    return parser


def visualize_parser() -> argparse.ArgumentParser:
    """The parser of `visualize.py`."""
    parser = _parser_of_a_run(None, VISUALIZE_DESCRIPTION, "dataset_name", "root_dir", "test_batch_size", "num_workers")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--query_idx",
        type=whole_number(0),
        default=3900,
        help="caption of the test split, from 0 (default: 3900 or last)",
    )
    choice.add_argument("--caption", help="your own sentence")
    parser.add_argument("--topk", type=whole_number(1), default=10, help="images to show (default: 10)")
    parser.add_argument("--output", default="ui.png", help="picture to write (default: ui.png)")
    return parser


def index_parser() -> argparse.ArgumentParser:
    """The parser of `cmlfa-index`."""
    parser = _parser_of_a_run("cmlfa-index", INDEX_DESCRIPTION, "num_workers")
    _add(
        parser,
        "test_batch_size",
        names=("--test_batch_size", "--batch_size"),
        help="images encoded at once (default: as stored)",
    )
    add_gallery_flags(parser)
    return parser


def search_parser() -> argparse.ArgumentParser:
    """The parser of `cmlfa-search`."""
    parser = _parser_of_a_run("cmlfa-search", SEARCH_DESCRIPTION)
    parser.add_argument("--text", required=True, help="the person to look for")
    add_hit_flags(parser, output="hits.png")
    return parser


def _parser_of_a_run(name: str | None, description: str, *overrides: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config_file", help="the configs.yaml of a run directory, written by train.py")
    parser.add_argument(
        "--checkpoint",
        help="weights to use (default: best.pth of the run directory); a folder in the layout of the hub, or its name there, needs "
        "no --config_file",
    )
    _add(parser, "trust_checkpoint")
    for override in ("device", "precision", *overrides):
        _add(parser, override, help=f"{OVERRIDES[override]} (default: as trained)")
    return parser
