"""`tbps-model inspect | convert | export`.

tbps-model inspect data/checkpoint/ft_cuhk.pth
tbps-model convert logs/CUHK-PEDES/RUN/best.pth --to hub --out my_model
tbps-model convert my_model --to official --out best.pth
tbps-model export my_model --onnx --out onnx --int8
"""

import argparse
from importlib import import_module

from tbps_common.errors import InputError
from tbps_common.run.arguments import parser_of_commands, whole_number


def build_parser() -> argparse.ArgumentParser:
    """Parser of `tbps-model`."""
    parser, (inspect, convert, export) = parser_of_commands(
        "tbps-model",
        "Say what a weight file is, convert it to and from the layout of the Hugging Face hub, or export its encoders.",
        {
            "inspect": (
                "which paper and layout, sizes, missing and unexpected names, checksum",
                "No weights are read into memory and nothing in the file is run. Exit status: 0 if the file is of a known layout "
                "and fits its model, 1 if not, 2 if it cannot be read.",
            ),
            "convert": (
                "a checkpoint of CMLFA, FAFA or MRA to the layout of the hub, or back",
                "Weights are copied bit by bit.",
            ),
            "export": (
                "image and text encoders of CMLFA, FAFA or MRA as ONNX files",
                "Needs pip install 'tbps-common[onnx]'. Compares the files with torch on random inputs.",
            ),
        },
    )
    inspect.add_argument(
        "file", metavar="FILE", help="weight file, or a folder in the layout of the hub or of diffusers"
    )
    inspect.add_argument("--names", action="store_true", help="list every tensor with its shape and type")
    inspect.add_argument("--no_checksum", action="store_true", help="do not read the whole file for its SHA-256")
    inspect.add_argument("--json", metavar="OUT", help="also write what is found to OUT")

    convert.add_argument(
        "file", metavar="FILE", help="checkpoint, or (for --to official) a folder in the layout of the hub"
    )
    convert.add_argument("--to", required=True, choices=("hub", "official"))
    convert.add_argument("--out", required=True, metavar="OUT", help="folder (hub) or file (official) to write")
    convert.add_argument(
        "--config",
        metavar="FILE",
        help="how the model was trained: configs.yaml (CMLFA), model_config.yaml (FAFA), config.yaml (MRA); by default the one "
        "beside or inside the checkpoint",
    )
    convert.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder with vocab.txt (FAFA, MRA); by default the one that the configuration names",
    )
    convert.add_argument(
        "--trust_checkpoint",
        "--trust-checkpoint",
        action="store_true",
        help="read a checkpoint that only Python's pickle can read; such a file can run any code, so only use this for files "
        "whose source you trust",
    )

    export.add_argument("model", metavar="MODEL", help="folder in the layout of the hub, or a name on the hub")
    export.add_argument("--onnx", action="store_true", required=True, help="the format; there is no other yet")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    export.add_argument(
        "--int8", action="store_true", help="also write copies with the weights of linear layers in 8 bits"
    )
    export.add_argument("--batch_size", type=whole_number(1), default=8, help="of the measurement (default: 8)")
    return parser


def main(argv: list[str]) -> int:
    """Run `tbps-model`; returns the exit status."""
    flags = build_parser().parse_args(argv)
    try:
        module = import_module(f"tbps_common.models.{flags.command}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("onnx", "onnxruntime", "onnxscript"):
            raise
        raise InputError(f"{error.name} is not installed: pip install 'tbps-common[onnx]'") from error
    return module.main(flags)
