"""The flags of `train.py`: the authors' flags with their names, types and defaults, and the project's additions.

Every default of the package lives in this parser and nowhere else. Flags of one value are checked while parsing (exit
status 2, as argparse does); `check_training_flags` checks what needs several flags at once.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from cmlfa.model.settings import LFA_ATTENTION, LOSSES, PRECISIONS
from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, add_bad_images_flag, number, whole_number

DATASET_NAMES = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
OPTIMIZERS = ("SGD", "Adam", "AdamW")
SCHEDULES = ("step", "exp", "poly", "cosine", "linear")
DEVICES = ("auto", "cuda", "cpu")

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

A flag given twice keeps its last value, so a command can be adapted by appending to it.
The run directory <output_dir>/<dataset_name>/<date>_<time>_<name> receives configs.yaml, train_log.txt, TensorBoard
events, best.pth (best R1) and last.pth (the state to go on from with --resume).
Several GPUs: torchrun --nproc_per_node=N train.py ... (each process takes a batch of its own and computes its own
losses, so N processes of 64 are not one batch of 64*N).
"""


def image_size(text: str) -> tuple[int, int]:
    """`384,128`, `384 128` or `(384,128)`, height first."""
    match = re.fullmatch(r"[\[(]?\s*(\d+)\s*[,x\s]\s*(\d+)\s*,?\s*[\])]?", text.strip())
    if not match or not all(int(side) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"expects height,width in pixels such as 384,128, not {text!r}")
    return int(match[1]), int(match[2])


def loss_names(text: str) -> str:
    """A `+`-joined subset of the losses, kept as it was written."""
    names = split_losses(text)
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        wrong = ", ".join(repr(name) for name in unknown) or "nothing"
        raise argparse.ArgumentTypeError(f"expects losses out of {', '.join(LOSSES)} joined by '+', not {wrong}")
    return text


def split_losses(text: str) -> list[str]:
    """`'sdm + id'` -> `['sdm', 'id']`."""
    return [name.strip() for name in text.split("+") if name.strip()]


def optimizer_name(text: str) -> str:
    """The optimizer's name in any case: the authors' help text says `Adamw`, their code expects `AdamW`."""
    for name in OPTIMIZERS:
        if text.lower() == name.lower():
            return name
    raise argparse.ArgumentTypeError(f"expects one of {', '.join(OPTIMIZERS)}, not {text!r}")


def run_name(text: str) -> str:
    """A run name is the end of a folder's name."""
    if re.search(r"[/\\\0]", text):
        raise argparse.ArgumentTypeError(f"becomes part of a folder's name and cannot hold a path separator: {text!r}")
    return text


class _ImageSize(argparse.Action):
    """Accepts the two sides as one word or as two."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, image_size(" ".join(values)))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    """The parser of `train.py`; `get_args` uses it, and `cmlfa.config` takes the defaults from it."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False)
    run = parser.add_argument_group("run (the authors' flags)")
    run.add_argument("--name", type=run_name, default="baseline", help="name of the run, end of its folder's name")
    run.add_argument("--output_dir", default="logs", help="root of the run directories")
    run.add_argument("--log_period", type=whole_number(1), default=100, help="iterations between two log lines")
    run.add_argument("--eval_period", type=whole_number(1), default=1, help="epochs between two evaluations")
    run.add_argument(
        "--val_dataset",
        default="test",
        help="split evaluated during training: 'val' is the validation split, anything else the test split "
        "(the released recipe selects its best epoch on the test split)",
    )
    run.add_argument("--resume", action="store_true", help="go on with an interrupted run; alone: the newest of --name")
    run.add_argument("--resume_ckpt_file", default="", help="checkpoint to go on from, together with --resume")
    run.add_argument(
        "--local_rank",
        "--local-rank",
        type=whole_number(0),
        default=0,
        help="GPU of this process under an old launcher; torchrun's LOCAL_RANK wins",
    )
    run.add_argument(
        "--test", dest="training", default=True, action="store_false", help="mark the flags as those of a test"
    )

    model = parser.add_argument_group("model (the authors' flags)")
    model.add_argument("--pretrain_choice", default="ViT-B/16", help="OpenAI CLIP by name, or a .pt/.safetensors file")
    model.add_argument("--temperature", type=number(0, above=True), default=0.02, help="of all similarities; constant")
    model.add_argument("--img_aug", action="store_true", help="augment training images (flip, pad and crop, erase)")
    model.add_argument("--cmt_depth", type=whole_number(1), default=4, help="layers of the cross-modal transformer")
    model.add_argument("--masked_token_rate", type=float, default=0.8, help="accepted; the released code ignores it")
    model.add_argument(
        "--masked_token_unchanged_rate", type=float, default=0.1, help="accepted; the released code ignores it"
    )
    model.add_argument(
        "--lr_factor",
        type=number(0),
        default=5.0,
        help="learning-rate factor of the cross-modal modules, the classifier and the MLM head",
    )
    model.add_argument("--MLM", action="store_true", help="load captions with masked tokens; needed by the loss 'mlm'")
    model.add_argument(
        "--loss_names", type=loss_names, default="sdm+id+mlm", help=f"losses out of {', '.join(LOSSES)} joined by '+'"
    )
    model.add_argument("--mlm_loss_weight", type=number(0), default=1.0, help="weight of the masked-language loss")
    model.add_argument(
        "--id_loss_weight",
        type=number(0),
        default=0.5,
        help="weight of the identity loss (the released code ignores its flag and always uses 0.5)",
    )
    model.add_argument(
        "--img_size", nargs="+", action=_ImageSize, default=(384, 128), metavar="H,W", help="image height and width"
    )
    model.add_argument("--stride_size", type=whole_number(1), default=16, help="stride of the image patches")
    model.add_argument("--text_length", type=whole_number(3), default=77, help="tokens per caption")
    model.add_argument("--vocab_size", type=whole_number(1), default=49408, help="size of the MLM head")

    solver = parser.add_argument_group("optimisation (the authors' flags)")
    solver.add_argument(
        "--optimizer", type=optimizer_name, default="Adam", metavar="{SGD,Adam,AdamW}", help="Adam has eps 1e-3"
    )
    solver.add_argument("--lr", type=number(0), default=1e-5, help="base learning rate")
    solver.add_argument("--bias_lr_factor", type=number(0), default=2.0, help="learning-rate factor of the biases")
    solver.add_argument("--momentum", type=number(0), default=0.9, help="of SGD")
    solver.add_argument("--weight_decay", type=number(0), default=4e-5, help="of weights")
    solver.add_argument("--weight_decay_bias", type=number(0), default=0.0, help="of biases")
    solver.add_argument("--alpha", type=number(0, 1), default=0.9, help="first beta of Adam")
    solver.add_argument("--beta", type=number(0, 1), default=0.999, help="second beta of Adam")
    solver.add_argument("--num_epoch", type=whole_number(1), default=60, help="epochs of the whole run")
    solver.add_argument(
        "--milestones", type=whole_number(0), nargs="+", default=(20, 50), help="epochs of the step schedule"
    )
    solver.add_argument("--gamma", type=number(), default=0.1, help="factor of the step schedule at each milestone")
    solver.add_argument("--warmup_factor", type=number(0), default=0.1, help="learning-rate factor of the first epoch")
    solver.add_argument("--warmup_epochs", type=whole_number(0), default=5, help="epochs of warm-up")
    solver.add_argument(
        "--warmup_method", choices=("linear", "constant"), default="linear", help="shape of the warm-up"
    )
    solver.add_argument("--lrscheduler", choices=SCHEDULES, default="cosine", help="schedule after the warm-up")
    solver.add_argument("--target_lr", type=number(0), default=0, help="last learning rate of cosine and poly")
    solver.add_argument("--power", type=number(), default=0.9, help="of exp and poly")

    data = parser.add_argument_group("data (the authors' flags)")
    data.add_argument("--dataset_name", choices=DATASET_NAMES, default="CUHK-PEDES", help="data set")
    data.add_argument(
        "--sampler",
        choices=("random", "identity"),
        default="random",
        help="random: every caption once per epoch; identity: --num_instance captions of each person in a batch",
    )
    data.add_argument("--num_instance", type=whole_number(1), default=4, help="captions per person (identity sampler)")
    data.add_argument("--root_dir", default="./data", help="folder that holds the data set's folder")
    data.add_argument(
        "--batch_size", type=whole_number(1), default=128, help="of training, and of evaluation during training"
    )
    data.add_argument("--test_batch_size", type=whole_number(1), default=512, help="of test.py")
    data.add_argument("--num_workers", type=whole_number(0), default=8, help="processes that load the data")

    ours = parser.add_argument_group("additions of this project (the defaults reproduce the released code)")
    ours.add_argument(
        "--lfa_attention",
        choices=LFA_ATTENTION,
        default="batch",
        help="what the shared transformer attends over: the samples of the batch (released code: features depend on "
        "the batch they are computed in) or the prototypes' slots of one sample (the paper's figure)",
    )
    ours.add_argument(
        "--clean_captions",
        action="store_true",
        help="with --MLM: train SDM, ITC and ID on the unmasked captions (paper), not on the masked ones (released code)",
    )
    ours.add_argument("--itc_loss_weight", type=number(0), default=5.0, help="weight of the ITC loss")
    ours.add_argument("--num_prototypes", type=whole_number(1), default=9, help="learnable prototypes (LFA)")
    ours.add_argument("--lfa_layers", type=whole_number(1), default=6, help="layers of the shared transformer")
    ours.add_argument("--lfa_heads", type=whole_number(1), default=8, help="heads of the shared transformer")
    ours.add_argument("--lfa_dropout", type=number(0, 1), default=0.3, help="drop-out of the LFA's feed-forward block")
    ours.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: fp16 weights on a GPU as released, fp32 on the CPU; amp: fp32 weights under autocast",
    )
    ours.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU if there is one")
    ours.add_argument(
        "--seed", type=whole_number(0), default=1, help="seed of the first process; process r uses seed+r"
    )
    add_bad_images_flag(ours)
    add_trust_flag(ours)
    return parser


def add_trust_flag(group: Any) -> None:
    """`--trust_checkpoint`, shared by every command that reads a checkpoint."""
    group.add_argument(
        "--trust_checkpoint",
        "--trust-checkpoint",
        action="store_true",
        help="read a checkpoint that only Python's pickle can read; such a file can run any code, so only use this for "
        "files whose source you trust",
    )


def get_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags of a training run; `argv=[]` gives every default, `None` the command line."""
    args = build_parser().parse_args(argv)
    args.milestones = tuple(args.milestones)
    return args


def default_options() -> dict[str, Any]:
    """Every flag with its default."""
    return vars(get_args([]))


def flag_problem(name: str, value: Any) -> str | None:
    """Why `value` cannot be the value of flag `name`, or None; used for values that come from a file."""
    action = next((action for action in build_parser()._actions if action.dest == name), None)
    if action is None:
        return None
    if isinstance(action.default, bool):
        return None if isinstance(value, bool) else f"expects true or false, not {value!r}"
    if isinstance(action.default, tuple):
        if not isinstance(value, (list, tuple)) or any(type(part) is not int for part in value):
            return f"expects a list of whole numbers, not {value!r}"
        parse = image_size if name == "img_size" else None
        text = ",".join(str(part) for part in value)
    else:
        if isinstance(value, (list, dict, bool)) or value is None:
            return f"expects a single value, not {value!r}"
        parse, text = action.type, str(value)
    try:
        if callable(parse):
            parse(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        return str(error)
    if action.choices is not None and value not in action.choices:
        return f"expects one of {', '.join(map(str, action.choices))}, not {value!r}"
    return None


def check_training_flags(args: argparse.Namespace) -> None:
    """Refuse combinations of flags that cannot be trained, before anything is loaded or written.

    Raises:
        InputError: one sentence naming the flags and the remedy.
    """
    losses = split_losses(args.loss_names)
    if not args.training:
        raise InputError(
            "--test asks for an evaluation, which train.py does not do: run test.py --config_file "
            "<run directory>/configs.yaml"
        )
    if "mlm" in losses and not args.MLM:
        raise InputError(
            f"--loss_names {args.loss_names} contains mlm, which needs the masked captions of --MLM: add --MLM, or "
            "remove mlm from --loss_names"
        )
    if args.sampler == "identity":
        if args.num_instance > args.batch_size:
            raise InputError(
                f"--num_instance {args.num_instance} is larger than --batch_size {args.batch_size}: the identity "
                "sampler needs at least one person per batch"
            )
        if args.batch_size % args.num_instance:
            raise InputError(
                f"--batch_size {args.batch_size} is not a multiple of --num_instance {args.num_instance}, as the "
                "identity sampler needs"
            )
    if list(args.milestones) != sorted(args.milestones):
        raise InputError(f"--milestones {' '.join(map(str, args.milestones))} must be in ascending order")
    if args.resume_ckpt_file and not args.resume:
        raise InputError(f"--resume_ckpt_file {args.resume_ckpt_file} has no effect without --resume: add --resume")
