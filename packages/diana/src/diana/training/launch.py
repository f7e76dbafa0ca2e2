"""Start `train.py` in as many processes as there are devices: what the shell scripts call in torchrun's form.

    python -m diana.training.launch --nproc_per_node=8 --master_port=34229 main/train/train.py FLAGS

Flags, paths and annotations are checked here once, so that a mistake is one line and not one traceback per process. Then
this process becomes torchrun, or, for a single process, `train.py` itself.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from tbps_common.run.command import command


def launch_command(argv: Sequence[str], devices: int) -> list[str]:
    """The program to become.

    Args:
        argv: this module's arguments.
        devices: GPUs that can be used.
    """
    args = _parse(argv)
    processes = min(args.nproc_per_node, devices) if devices else args.cpu_processes
    several = args.nnodes > 1 or processes > 1
    if not several:
        return [sys.executable, args.script, *args.flags]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={args.nnodes}", f"--node_rank={args.node_rank}"),
        *(f"--master_addr={args.master_addr}", f"--master_port={args.master_port}"),
        f"--nproc_per_node={processes}",
        *(args.script, *args.flags),
    ]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch", allow_abbrev=False, description=__doc__)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node_rank", type=int, default=0)
    parser.add_argument("--master_addr", default="127.0.0.1")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument("--nproc_per_node", type=int, default=8, help="most processes; one per GPU")
    parser.add_argument(
        "--cpu_processes",
        type=int,
        default=os.environ.get("CPU_PROCESSES") or "1",  # a text, which argparse reads and checks like a flag's
        help="processes without a GPU (environment: CPU_PROCESSES)",
    )
    parser.add_argument("script", help="train.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of train.py")
    args = parser.parse_args(list(argv))
    for name in ("nproc_per_node", "cpu_processes"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, not {getattr(args, name)}")
    return args


@command
def main(argv: list[str]) -> int:
    """Check, count the devices, and become the training program."""
    args = _parse(argv)
    from diana.training.preflight import parse_and_check

    flags, _ = parse_and_check(args.flags)
    devices = 0 if flags.device == "cpu" else _gpus()
    if devices < args.nproc_per_node:
        using = f"{devices} GPU(s)" if devices else f"the CPU with {args.cpu_processes} process(es)"
        print(f"{args.nproc_per_node} GPUs asked for, {devices} found: using {using}", flush=True)
    words = launch_command(argv, devices)
    os.execv(words[0], words)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main())
