"""`python -m dp_gen.checkpoint export SRC DST`: a checkpoint of any known form, in the authors' layout."""

import argparse
import sys
from pathlib import Path

from tbps_common.errors import InputError

LAYOUTS = {"dp": "controller", "fastcomposer": "postfuse_module"}


def run(argv: list[str]) -> int:
    """Convert one checkpoint.

    Raises:
        InputError: the source cannot be read, or the target's kind is unknown.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dp_gen.checkpoint",
        description="Write a checkpoint in the layout that the authors' code loads strictly (transformers 4.25.1, "
        "diffusers 0.16.1), or in FastComposer's.",
    )
    export = parser.add_subparsers(dest="command", required=True).add_parser("export", help="convert a checkpoint")
    export.add_argument("source", metavar="SRC", help="checkpoint folder, final folder, or weights file")
    export.add_argument("target", metavar="DST", help="file to write: .bin or .pt (torch), or .safetensors")
    export.add_argument("--layout", choices=tuple(LAYOUTS), default="dp", help="names of the weights (default: dp)")
    args = parser.parse_args(argv)
    target = Path(args.target)
    if target.suffix not in (".bin", ".pt", ".safetensors"):
        raise InputError(f"{target} must end in .bin, .pt or .safetensors: rename the target")
    from dp_gen.model.weights import official_layout, read_weights
    from tbps_common.files import atomic_path
    from tbps_common.run.checkpoint import save_checkpoint

    weights = official_layout(read_weights(args.source), controller=LAYOUTS[args.layout])
    if target.suffix == ".safetensors":
        from safetensors.torch import save_file

        with atomic_path(target) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    else:
        save_checkpoint(weights, target)
    print(f"{len(weights)} tensors written to {target}")
    return 0


if __name__ == "__main__":
    from dp_gen.cli import checkpoint_main

    sys.exit(checkpoint_main())
