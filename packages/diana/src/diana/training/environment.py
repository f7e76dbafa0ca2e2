"""`LAUNCHER`: where this process finds its place among the others, translated to torchrun's variables."""

import os
import re
from collections.abc import MutableMapping

from tbps_common.errors import InputError

LAUNCHERS = ("pytorch", "slurm", "mpi")
_PORT = "29500"


def adopt_launcher(environment: MutableMapping[str, str] | None = None) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the launcher named by LAUNCHER means them.

    `pytorch` (torchrun) sets them itself; `slurm` (the default, as released) and `mpi` have variables of their own.
    Without any of them this is the only process.

    Raises:
        InputError: LAUNCHER is none of the three.
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
