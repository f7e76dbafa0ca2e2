"""The flags of every command, with all their defaults: the authors' flags with their names and types, and our additions.

Flags of one value are checked while parsing (exit status 2, as argparse does); `check_training_flags` checks what needs
several flags at once. The flags of `fafa-syncpr` and `fafa-itcpr` stand beside what they start.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from fafa.model.settings import MODEL_NAME
from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, add_require_published_flag, add_tf32_flag, number, whole_number
from tbps_common.search.options import add_gallery_flags, add_hit_flags

TRANSFORMS = ("squarepad", "targetpad", "resize")
AMP_DTYPES = ("fp16", "bf16", "fp32")
BAD_IMAGES = ("drop", "stop")

TRAINING = """\
Train FAFA on SynCPR and validate it on ITCPR.

The paper's command, run from packages/fafa:

  python src/blip_fine_tune_new.py \\
    --dataset cpr \\
    --syncpr-data-path /your/custom/syncpr/root \\
    --itcpr-root /your/custom/itcpr/root \\
    --json-path SynCPR.json \\
    --exp-name FAFA_SynCPR_FDA_FD_MFR \\
    --blip-model-name blip2_fafa_cpr \\
    --setting annotations \\
    --num-epochs 10 \\
    --num-workers 4 \\
    --learning-rate 2e-6 \\
    --batch-size 256 \\
    --transform squarepad \\
    --save-training \\
    --save-best \\
    --validation-frequency 1 \\
    --validation-step 500 \\
    --loss-fda 1.0 \\
    --loss-fd 1.0 \\
    --loss-mfr 0.5 \\
    --fda-k 6 \\
    --fda-alpha 0.5 \\
    --fd-margin 0.5

A flag given twice keeps its last value, so a command can be adapted by appending to it.
The run directory <output-dir>/<date>_<time>_<exp-name> receives training_hyperparameters.json, the tables of losses and
validations, saved_models/ and the state that --resume continues from.
Several GPUs: torchrun --nproc_per_node=N src/blip_fine_tune_new.py ... (each process has its own batches).
"""


def dataset_name(text: str) -> str:
    """`cpr` in any case."""
    if text.lower() != "cpr":
        raise argparse.ArgumentTypeError(f"Dataset should be 'CPR', not {text!r}")
    return text


def experiment_name(text: str) -> str:
    """The end of a folder's name."""
    if re.search(r"[/\\\0]", text):
        raise argparse.ArgumentTypeError(f"becomes part of a folder's name and cannot hold a path separator: {text!r}")
    return text


def step_count(text: str) -> int:
    """A whole number of at least 1, also as 1e6 (which the released code's default is)."""
    is_power = re.fullmatch(r"(\d+)[eE]\+?(\d{1,2})", text)
    return whole_number(1)(str(int(is_power[1]) * 10 ** int(is_power[2])) if is_power else text)


class TrainingFlags(argparse.Namespace):
    """The flags of a training run, parsed."""

    dataset: str
    syncpr_data_path: str
    itcpr_root: str
    json_path: str
    num_workers: int
    transform: str
    target_ratio: float
    setting: list[str]
    blip_model_name: str
    backbone: str
    num_query_token: int | None
    resume_path: str | None
    loss_fda: float
    loss_fd: float
    loss_mfr: float
    fda_k: int
    fda_alpha: float
    fd_margin: float
    exp_name: str
    num_epochs: int
    batch_size: int
    learning_rate: float
    validation_frequency: int
    validation_step: int
    save_training: bool
    save_best: bool
    save_last: bool
    save_memory: bool
    resume: str | None
    save_state_every: int
    seed: int | None
    device: str
    amp_dtype: str
    use_fda_alpha: bool
    gather: bool
    compile: bool
    output_dir: str
    max_steps: int | None
    no_code_backup: bool
    bad_images: str
    log_every: int
    eval_batch_size: int
    eval_num_workers: int
    eval_cache_gb: float
    eval_cache_dir: str | None
    trust_checkpoint: bool


def get_args(argv: Sequence[str] | None = None) -> TrainingFlags:
    """Parse the flags of a training run; None reads the command line."""
    parser = _parser(TRAINING)
    _add_authors_flags(parser)
    _add_project_flags(parser)
    return parser.parse_args(argv, namespace=TrainingFlags())


def _parser(description: str, name: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )


def _add_authors_flags(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data (the authors' flags)")
    data.add_argument("--dataset", type=dataset_name, required=True, help="must be cpr")
    data.add_argument("--syncpr-data-path", required=True, help="SynCPR root")
    data.add_argument(
        "--itcpr-root", required=True, help="ITCPR root: query.json and gallery.json, here or in datasets/"
    )
    data.add_argument(
        "--json-path", default="SynCPR.json", help="annotation of SynCPR, relative to its root or absolute"
    )
    data.add_argument("--num-workers", type=whole_number(0), default=2, help="processes that load training images")
    data.add_argument("--transform", choices=TRANSFORMS, default="targetpad", help="how a picture becomes square")
    data.add_argument("--target-ratio", type=number(0, above=True), default=1.25, help="aspect ratio of targetpad")
    data.add_argument("--setting", nargs="+", default=["omini"], help="recorded, without effect (as released)")

    model = parser.add_argument_group("model (the authors' flags)")
    model.add_argument("--blip-model-name", choices=[MODEL_NAME], default=MODEL_NAME, help="architecture")
    model.add_argument(
        "--backbone",
        default="pretrain",
        help="pretrain (ViT-g), pretrain_vitL, coco, or (addition) a YAML file that describes the model",
    )
    model.add_argument("--num-query-token", type=whole_number(1), help="query tokens; by default the backbone's (32)")
    model.add_argument("--resume-path", help="checkpoint loaded over the start weights (weights only; see --resume)")

    loss = parser.add_argument_group("losses (the authors' flags)")
    loss.add_argument("--loss-fda", type=number(0), default=1.0, help="weight of FDA (the released code ignores it)")
    loss.add_argument("--loss-fd", type=number(0), default=1.0, help="weight of FD")
    loss.add_argument("--loss-mfr", type=number(0), default=0.5, help="weight of MFR")
    loss.add_argument("--fda-k", type=whole_number(1), default=6, help="tokens averaged by the similarity")
    loss.add_argument("--fda-alpha", type=number(0), default=0.5, help="recorded; used with --use-fda-alpha only")
    loss.add_argument("--fd-margin", type=number(), default=0.5, help="margin of FD")

    run = parser.add_argument_group("run (the authors' flags)")
    run.add_argument("--exp-name", type=experiment_name, default="cir", help="end of the run directory's name")
    run.add_argument("--num-epochs", type=whole_number(1), default=10, help="epochs of the whole run")
    run.add_argument("--batch-size", type=whole_number(1), default=256, help="triplets per step and process")
    run.add_argument(
        "--learning-rate", type=number(0, above=True), default=2e-6, help="highest learning rate of OneCycle"
    )
    run.add_argument("--validation-frequency", type=whole_number(1), default=1, help="epochs between two validations")
    run.add_argument("--validation-step", type=step_count, default=1_000_000, help="steps between two validations")
    run.add_argument("--save-training", action="store_true", help="write weights; without it none are written")
    run.add_argument("--save-best", action="store_true", help="with --save-training: weights of the best R@1")
    run.add_argument("--save-last", action="store_true", help="with --save-training: weights of the last validation")
    run.add_argument("--save-memory", action="store_true", help="recorded, without effect (as released)")


def _add_project_flags(parser: argparse.ArgumentParser) -> None:
    ours = parser.add_argument_group("additions of this project (the defaults reproduce the released code)")
    ours.add_argument(
        "--resume",
        metavar="RUN_DIR|auto",
        help="continue an interrupted run exactly where its state was last saved; auto: the newest run of --exp-name",
    )
    ours.add_argument(
        "--save-state-every",
        type=whole_number(0),
        default=500,
        metavar="STEPS",
        help="save the state for --resume every so many steps, in addition to every epoch; 0: after epochs only",
    )
    ours.add_argument("--seed", type=int, help="process r uses seed + r; by default drawn at random and recorded")
    ours.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    ours.add_argument(
        "--amp-dtype",
        choices=AMP_DTYPES,
        default="fp16",
        help="autocast of the training step: fp16 needs a GPU and is float32 on a CPU; bf16 works on both",
    )
    ours.add_argument(
        "--use-fda-alpha", action="store_true", help="weigh the other pairs of a group with --fda-alpha, not 1"
    )
    ours.add_argument(
        "--gather",
        action="store_true",
        help="several processes: compute the losses over the batches of all, as one large batch; needs --bad-images stop",
    )
    ours.add_argument(
        "--compile",
        action="store_true",
        help="compile the ViT with torch.compile: slow first steps, then faster ones on a GPU; needs a C compiler",
    )
    ours.add_argument("--output-dir", default="output/cpr", help="folder of the run directories")
    ours.add_argument(
        "--max-steps", type=whole_number(1), help="end the run early, after this many steps; the schedule stays"
    )
    ours.add_argument("--no-code-backup", action="store_true", help="do not copy the package's source to code_backup/")
    ours.add_argument(
        "--bad-images",
        choices=BAD_IMAGES,
        default="drop",
        help="what to do with training triplets that cannot be loaded",
    )
    ours.add_argument("--log-every", type=whole_number(1), default=50, help="steps between two lines of the log")
    ours.add_argument(
        "--eval-batch-size", type=whole_number(1), default=64, help="images encoded at once in validation"
    )
    ours.add_argument("--eval-num-workers", type=whole_number(0), default=2, help="processes that load ITCPR images")
    ours.add_argument(
        "--eval-cache-gb",
        type=number(0),
        default=4.0,
        help="memory per process that keeps a frozen ViT's outputs on ITCPR for later validations; 0: none",
    )
    ours.add_argument("--eval-cache-dir", help="keep these outputs in a file in this folder instead of in memory")
    _add_trust_flag(ours)


def _add_trust_flag(group: Any) -> None:
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="read a checkpoint that only Python's pickle can read; such a file can run any code, so only use this for "
        "files whose source you trust",
    )


def check_training_flags(args: TrainingFlags) -> list[str]:
    """Refuse combinations of flags that cannot be trained, before anything is loaded or written.

    Returns:
        Sentences about flags that will have no effect.

    Raises:
        InputError: one sentence naming the flags and the remedy.
    """
    if args.seed is not None and not 0 <= args.seed < 2**31:
        raise InputError(f"--seed {args.seed} is out of range: give a number from 0 to 2147483647")
    if args.num_query_token is not None and args.fda_k > args.num_query_token:
        raise InputError(
            f"--fda-k {args.fda_k} is larger than --num-query-token {args.num_query_token}: the similarity is a mean over "
            "that many of the query tokens"
        )
    if args.resume and args.resume_path:
        raise InputError("--resume continues a run with its weights, --resume-path starts a new run: give one of them")
    if args.gather and args.bad_images != "stop":
        raise InputError(
            "--gather needs batches of one size on all processes, and a triplet that is left out makes one smaller: add "
            "--bad-images stop"
        )
    warnings = []
    if not args.save_training:
        unused = [flag for flag in ("save_best", "save_last") if getattr(args, flag)]
        named = " and ".join(f"--{flag.replace('_', '-')}" for flag in unused)
        warnings.append(
            f"{named} without --save-training: no weights will be saved"
            if unused
            else "without --save-training no weights will be saved for inference"
        )
    elif not (args.save_best or args.save_last):
        warnings.append("--save-training alone saves no weights: add --save-best or --save-last")
    if args.save_memory:
        warnings.append("--save-memory has no effect, as in the released code")
    if args.eval_cache_dir and not args.eval_cache_gb:
        warnings.append("--eval-cache-dir has no effect with --eval-cache-gb 0")
    return warnings


INFERENCE = """\
Evaluate a trained model on ITCPR.

The paper's command, run from packages/fafa:

  python inference_fafa.py \\
    --exp-dir output/cpr/FAFA_experiment \\
    --model-name tuned_recall_at1_step.pt \\
    --itcpr-root /path/to/ITCPR \\
    --batch-size 256

Writes inference_results_<model-name>.json, evaluation.json, cmc.png and ranked_list.png into the run directory; for a
model named on the hub, into results/<owner>--<name>. A downloaded checkpoint needs <dir>/training_hyperparameters.json and
<dir>/saved_models/<file>.pt.
"""
INDEX = """\
Compute the features of all images of a folder once, for fafa-search:

  fafa-index --exp-dir RUN --model-name tuned_recall_at1_epoch.pt --images FOLDER --out people.lance

A gallery that exists is brought up to date with the folder: see tbps-index --help.
"""
SEARCH = """\
Find images of the person of a picture, with the changes that a sentence names, best first:

  fafa-search --exp-dir RUN --model-name tuned_recall_at1_epoch.pt --gallery people.lance \\
    --image reference.jpg --text "now wearing a red coat"
"""


def inference_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags of `inference_fafa.py`."""
    parser = _parser(INFERENCE)
    _add_run_flags(parser)
    parser.add_argument("--dataset", choices=["itcpr"], default="itcpr", help="data set")
    parser.add_argument("--itcpr-root", help="ITCPR root; by default the one recorded by the training")
    _add_loading_flags(parser)
    ours = parser.add_argument_group("additions of this project")
    ours.add_argument(
        "--fda-k-sweep",
        type=whole_number(1),
        nargs="+",
        metavar="K",
        help="print and write the metrics for several numbers of averaged tokens, from the same features",
    )
    ours.add_argument("--report-dir", help="folder of evaluation.json and the pictures; by default the run directory")
    add_tf32_flag(ours)
    add_require_published_flag(ours)
    return parser.parse_args(argv)


def index_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags of `fafa-index`."""
    parser = _parser(INDEX, "fafa-index")
    _add_run_flags(parser)
    add_gallery_flags(parser)
    _add_loading_flags(parser)
    return parser.parse_args(argv)


def search_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags of `fafa-search`."""
    parser = _parser(SEARCH, "fafa-search")
    _add_run_flags(parser)
    parser.add_argument("--image", required=True, help="picture of the person")
    parser.add_argument("--text", required=True, help="what should be different in the images to find")
    add_hit_flags(parser, output="hits.png")
    return parser.parse_args(argv)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a trained model."""
    parser.add_argument(
        "--exp-dir",
        required=True,
        help="run directory, with training_hyperparameters.json; or a folder in the layout of the hub, or its name there",
    )
    parser.add_argument("--model-name", default="tuned_recall_at1_step.pt", help="file of its saved_models/")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; without a GPU the CPU is used")
    parser.add_argument(
        "--backbone",
        help="addition: model to build instead of the recorded one: pretrain, pretrain_vitL, coco or a YAML file",
    )
    _add_trust_flag(parser)


def _add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """How images are loaded."""
    parser.add_argument("--batch-size", type=whole_number(1), default=256, help="images encoded at once")
    parser.add_argument("--num-workers", type=whole_number(0), default=4, help="processes that load images")
