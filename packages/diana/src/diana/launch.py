"""Processes of a training: starting `train.py` once per device, and where each finds its place among the others.

The shell scripts call this module in torchrun's form:

    python -m diana.launch --nproc_per_node=8 --master_port=34229 main/train/train.py FLAGS

Flags, paths and annotations are checked here once, so that a mistake is one line and not one traceback per process. Then
this process becomes torchrun, or, for a single process, `train.py` itself.
"""

import argparse
import os
import re
import sys
from collections.abc import MutableMapping, Sequence

from diana.preflight import parse_and_check
from tbps_common.errors import InputError
from tbps_common.run.command import command, usable_processors

LAUNCHERS = ("pytorch", "slurm", "mpi")
_PORT = "29500"


def launch_command(argv: Sequence[str], devices: int) -> list[str]:
    """The program to become.

    Args:
        argv: this module's arguments.
        devices: GPUs that can be used.
    """
    args = _parse(argv)
    processes = min(args.nproc_per_node, devices) if devices else min(args.cpu_processes, usable_processors())
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
    parser.add_argument("--nproc_per_node", type=int, default=8, help="largest number of processes; one per GPU")
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
    flags, _ = parse_and_check(args.flags)
    devices = 0
    if flags.device != "cpu":
        import torch

        devices = torch.cuda.device_count()
    if devices < args.nproc_per_node:
        processors = usable_processors()
        using = f"{devices} GPU(s)" if devices else f"the CPU with {min(args.cpu_processes, processors)} process(es)"
        if not devices and args.cpu_processes > processors:
            using += f" instead of {args.cpu_processes}: there are no more processors"
        print(f"{args.nproc_per_node} GPUs requested, {devices} found: using {using}", flush=True)
    words = launch_command(argv, devices)
    os.execv(words[0], words)


def adopt_launcher(environment: MutableMapping[str, str] | None = None) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the launcher named by LAUNCHER means them.

    `pytorch` (torchrun) sets them itself; `slurm` (the default, as released) and `mpi` have variables of their own.
    Without any of them this is the only process.

    Raises:
        InputError: LAUNCHER has another value.
    """
    variables = os.environ if environment is None else environment
    launcher = variables.get("LAUNCHER", "slurm")
    if launcher not in LAUNCHERS:
        raise InputError(f"LAUNCHER is {launcher!r}: set it to one of {', '.join(LAUNCHERS)}, or unset it")
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return
    if launcher == "mpi" and "OMPI_COMM_WORLD_RANK" in variables:
        _adopt(variables, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "127.0.0.1")
    # Only srun sets the variables of a step: a plain program inside an allocation is one process.
    elif launcher == "slurm" and "SLURM_STEP_NUM_TASKS" in variables and "SLURM_PROCID" in variables:
        nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "127.0.0.1")
        _adopt(variables, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", first_host(nodes))


def _adopt(variables: MutableMapping[str, str], rank: str, world_size: str, local_rank: str, host: str) -> None:
    if variables.get(world_size, "1") == "1":
        return
    variables["RANK"] = variables[rank]
    variables["WORLD_SIZE"] = variables[world_size]
    variables["LOCAL_RANK"] = variables.get(local_rank, "0")
    variables.setdefault("MASTER_ADDR", host)
    variables.setdefault("MASTER_PORT", _PORT)


def use_one_gpu(environment: MutableMapping[str, str] | None = None) -> None:
    """Show a single process the first of its GPUs only, before CUDA is looked at.

    The trainer would otherwise spread the batch over all of them (DataParallel), and each part would compute losses of
    its own.
    """
    variables = os.environ if environment is None else environment
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    variables["CUDA_VISIBLE_DEVICES"] = "0" if visible is None else visible.split(",")[0]


def first_host(nodes: str) -> str:
    """First name of a Slurm node list: `gpu[03-05,9],other` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes.strip())
    if match is None:
        return "127.0.0.1"
    return match[1] + (match[2] or "") + (match[3] or "")


if __name__ == "__main__":
    sys.exit(main())
