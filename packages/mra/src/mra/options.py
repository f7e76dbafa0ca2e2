"""The flags of all commands but `mra-dad`.

`run.py` and `Retrieval.py` take the same flags of a run: the authors' with their names, types and defaults, and the
project's additions. `run.py` chooses the configuration and the number of processes, and hands the rest to `Retrieval.py`.
"""

import argparse
import os
import re
from typing import Any

from mra.config import TASKS
from mra.model.settings import REGION_FEATURES
from tbps_common.run.arguments import (
    HelpFormatter,
    add_bad_images_flag,
    add_require_published_flag,
    add_tf32_flag,
    number,
    whole_number,
)
from tbps_common.search.options import add_gallery_flags, add_hit_flags

DISTS = ("f4", "m0", "m1", "gpu0", "gpu1", "gpu2", "gpu3")

# Constants of the released run.py; --nproc, --master_addr and --master_port override them.
NNODES = 1
NPROC_PER_NODE = 4
MASTER_ADDR = "127.0.0.1"
MASTER_PORT = 3006
NODE_RANK = 0

RUN_DESCRIPTION = """\
Pre-train, fine-tune or evaluate MRA. The paper's commands, run from packages/mra:

  python3 run.py --task "sda"  --dist "f4" --output_dir "out/pre_sda"
  python3 run.py --task "cuhk" --dist "f4" --output_dir "out/ft_cuhk"   --checkpoint "data/checkpoint/pretrain.pth"
  python3 run.py --task "cuhk" --dist "f4" --output_dir "out/eval_cuhk" --checkpoint "data/checkpoint/ft_cuhk.pth" --evaluate

icfg and rstp work the same way. Reads configs/<task>.yaml (working directory first, else the released one), and starts
Retrieval.py with as many processes as --dist asks for and this machine has GPUs; without a GPU, one process on the CPU.
"""
RETRIEVAL_DESCRIPTION = """\
One process of a run, as run.py starts it; also works alone, or under torchrun and Slurm:

  python3 Retrieval.py --config configs/cuhk.yaml --task cuhk --output_dir out/ft_cuhk --checkpoint data/checkpoint/pretrain.pth
"""

INDEX_DESCRIPTION = """\
Compute the features of all images of a folder once, for mra-search:

  mra-index --checkpoint data/checkpoint/ft_cuhk.pth --images FOLDER --out people.lance

A gallery that exists is brought up to date with the folder: see tbps-index --help.
"""
SEARCH_DESCRIPTION = """\
Find the images of a gallery that fit a sentence, best first:

  mra-search --checkpoint data/checkpoint/ft_cuhk.pth --gallery people.lance --text "a man with a red backpack"

With --rerank 32 the fusion encoder judges the 32 most similar images (their files are read again for it), which is
slower and more accurate.
"""


class _HelpFormatter(HelpFormatter):
    """Shows every default that is a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def seed(text: str) -> int:
    """argparse type: a seed that numpy takes, with room for the ranks added to it."""
    value = whole_number(0)(text)
    if value >= 2**32 - 2**16:
        raise argparse.ArgumentTypeError(f"must be below {2**32 - 2**16}, not {value}")
    return value


def device(text: str) -> str:
    """argparse type: where to compute."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expects auto, cpu, cuda or cuda:N, not {text!r}")
    return text


def build_run_parser() -> argparse.ArgumentParser:
    """The parser of `run.py`."""
    parser = argparse.ArgumentParser(prog="run.py", description=RUN_DESCRIPTION, formatter_class=_HelpFormatter)
    group = parser.add_argument_group("the authors' flags")
    group.add_argument("--task", type=str, default="sda", help=f"one of {', '.join(TASKS)}")
    group.add_argument(
        "--dist",
        type=str,
        default="f4",
        help="f4: four GPUs; gpu0 ... gpu3: that GPU; m0, m1: node 0 or 1 of two nodes with four GPUs each. Numbers "
        "count within CUDA_VISIBLE_DEVICES if it is set",
    )
    group.add_argument("--output_dir", type=str, default="out/pre_sda", help="folder for everything a run writes")
    group.add_argument(
        "--checkpoint",
        type=str,
        default="data/checkpoint/pretrain.pth",
        help="weights to start from (tasks with load_pretrained), or to evaluate",
    )
    _add_run_flags(group)
    launch = parser.add_argument_group("processes (additions of this project)")
    launch.add_argument(
        "--nproc",
        type=whole_number(1),
        help="processes per node instead of what --dist asks for; more than there are GPUs only on the CPU",
    )
    launch.add_argument(
        "--master_addr",
        default=os.environ.get("MASTER_ADDR") or MASTER_ADDR,
        help="address of node 0 (m0, m1); MASTER_ADDR sets the default",
    )
    launch.add_argument(
        "--master_port",
        type=whole_number(1),
        help=f"port of node 0 (default: MASTER_PORT, else {MASTER_PORT}, else a free one)",
    )
    _add_additions(parser)
    return parser


def build_retrieval_parser() -> argparse.ArgumentParser:
    """The parser of `Retrieval.py`."""
    parser = argparse.ArgumentParser(
        prog="Retrieval.py", description=RETRIEVAL_DESCRIPTION, formatter_class=_HelpFormatter
    )
    group = parser.add_argument_group("the authors' flags")
    group.add_argument("--config", type=str, required=True, help="YAML file of the task")
    group.add_argument("--task", type=str, required=True, help=f"one of {', '.join(TASKS)}")
    group.add_argument("--output_dir", type=str, required=True, help="folder for everything a run writes")
    group.add_argument("--checkpoint", type=str, default="", help="weights to start from, or to evaluate")
    _add_run_flags(group)
    group.add_argument("--world_size", type=int, default=1, help="accepted; the launcher's WORLD_SIZE counts")
    group.add_argument("--dist_url", type=str, default="env://", help="accepted; env:// is what is used")
    group.add_argument(
        "--distributed", action="store_false", default=True, help="accepted; the launcher's variables decide"
    )
    _add_additions(parser)
    return parser


def _add_run_flags(group: Any) -> None:
    group.add_argument("--bs", type=whole_number(0), default=0, help="batch size of each process; 0: the YAML's")
    group.add_argument("--epo", type=whole_number(0), default=0, help="epochs; 0: the YAML's")
    group.add_argument("--lr", type=number(0), default=0.0, help="learning rate; 0: the YAML's")
    group.add_argument("--seed", type=seed, default=42, help="random seed; process r uses seed + r")
    group.add_argument("--evaluate", action="store_true", help="evaluate --checkpoint instead of training")
    # --re is what the released run.py passes on; written out, because argparse would find it ambiguous now.
    group.add_argument(
        "--region", "--re", "--reg", type=number(0), default=0.0, help="weight of the region loss; 0: the YAML's"
    )


def _add_additions(parser: argparse.ArgumentParser) -> None:
    ours = parser.add_argument_group("additions of this project (the defaults reproduce the released code)")
    ours.add_argument(
        "--score_world",
        type=whole_number(1),
        help="number of processes whose combination of scores is computed, however many run (default: as many as --dist "
        "asks for; 1 is the paper's formula)",
    )
    ours.add_argument(
        "--device", type=device, default="cuda", help="cuda: a GPU if there is one, else the CPU; cpu; cuda:N"
    )
    ours.add_argument("--resume", action="store_true", help="resume the run in --output_dir where it was interrupted")
    ours.add_argument(
        "--save_every",
        type=whole_number(0),
        default=1000,
        help="steps between two writes of last.pth, the state to resume from; it is also written at the end of an epoch "
        "and when the run is stopped; 0: never, as released",
    )
    ours.add_argument("--num_workers", type=whole_number(0), default=4, help="processes that load data, per process")
    ours.add_argument(
        "--select",
        choices=("test", "val"),
        default="test",
        help="split that is evaluated after each epoch and chooses checkpoint_best.pth (released: test)",
    )
    ours.add_argument(
        "--report",
        action="store_true",
        help="with --evaluate: also write evaluation JSON, CMC curve and ranked pictures",
    )
    add_require_published_flag(ours)
    add_tf32_flag(ours)
    ours.add_argument("--amp_eval", action="store_true", help="evaluate under bfloat16 autocast, where there is a GPU")
    ours.add_argument(
        "--region_feat",
        choices=REGION_FEATURES,
        help="region features of the region loss: the released code's (whose contrastive part never sees the box) or "
        "the paper's (default: the YAML's, else released)",
    )
    ours.add_argument(
        "--gradient_checkpointing", action="store_true", help="compute activations twice instead of keeping them"
    )
    ours.add_argument(
        "--grad_scaler",
        action="store_true",
        help="scale the gradients of bfloat16 on a GPU, as released: every step then waits for the GPU, and after some "
        "200,000 steps all are left out",
    )
    ours.add_argument("--log_every", type=whole_number(1), default=50, help="iterations between two log lines")
    add_bad_images_flag(ours)
    _add_trust_flag(ours)


def build_index_parser() -> argparse.ArgumentParser:
    """The parser of `mra-index`."""
    parser = _search_parser("mra-index", INDEX_DESCRIPTION)
    add_gallery_flags(parser)
    parser.add_argument("--batch_size", type=whole_number(1), help="images encoded at once (default: batch_size_test)")
    parser.add_argument("--num_workers", type=whole_number(0), default=4, help="processes that load images")
    return parser


def build_search_parser() -> argparse.ArgumentParser:
    """The parser of `mra-search`."""
    parser = _search_parser("mra-search", SEARCH_DESCRIPTION)
    parser.add_argument("--text", required=True, help="description of the person to look for")
    parser.add_argument(
        "--rerank", type=whole_number(0), default=0, help="most similar images that the fusion encoder judges; 0: none"
    )
    add_hit_flags(parser, output="hits.png")
    return parser


def _search_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="trained weights, such as data/checkpoint/ft_cuhk.pth")
    parser.add_argument(
        "--config", help="configuration of the weights, such as configs/cuhk.yaml (default: the one in the checkpoint)"
    )
    parser.add_argument("--text_encoder", help="folder with vocab.txt (default: the configuration's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    _add_trust_flag(parser)
    return parser


def _add_trust_flag(parser: Any) -> None:
    parser.add_argument(
        "--trust_checkpoint",
        "--trust-checkpoint",
        action="store_true",
        help="read a checkpoint that only Python's pickle can read; such a file can run any code, so only use this for "
        "files whose source you trust",
    )


# Flags of run.py that only decide which processes are started.
_LAUNCH_ONLY = ("dist", "nproc", "master_addr", "master_port")


def retrieval_arguments(args: argparse.Namespace, config: str) -> list[str]:
    """The command line of `Retrieval.py` for the flags of `run.py`: every flag is passed on."""
    words = ["--config", config]
    for name, value in vars(args).items():
        if name in _LAUNCH_ONLY or value is None or value is False:
            continue
        words.append(f"--{name}" if value is True else f"--{name}={value}")
    return words
