"""`fafa-syncpr`: the parser of all stages. Nothing heavy is imported to print a help text."""

import argparse
from importlib import import_module

from tbps_common.pipeline.stages import Shard, shard
from tbps_common.run.arguments import HelpFormatter

DESCRIPTION = """\
Make training data for composed person retrieval, as the paper made SynCPR: texts by a chat model, pictures by a
text-to-image model, filters, and the annotation file that fafa-train reads.

  fafa-syncpr quadruples --out syncpr ...   captions of one person in two pictures, and the edits between them
  fafa-syncpr images     --out syncpr ...   the pictures, side by side, cut into reference and target
  fafa-syncpr filter     --out syncpr ...   scores, thresholds, and questions to a model that sees
  fafa-syncpr pack       --out syncpr ...   SynCPR.json

  fafa-syncpr pairs      --out pairs ...    training pictures for the LoRA: two views of one person, side by side
  fafa-syncpr lora       --out lora ...     a LoRA that makes the text-to-image model draw one person twice
  fafa-syncpr cost                          GPU-hours and disk space at the paper's sizes, or at yours

Every stage can be killed and run again, and --shard i/n spreads it over n machines or GPUs that share the folder.
"""

# name -> (module, what it is, common flags)
_STAGES = {
    "quadruples": ("quadruples", "captions and edits from a chat model", ("shard",)),
    "images": ("images", "pictures from a text-to-image model", ("shard", "device", "dtype")),
    "filter": ("filter", "scores and thresholds", ("shard", "device", "dtype")),
    "pack": ("pack", "the annotation file", ()),
    "pairs": ("pairs", "side-by-side training pictures for the LoRA", ()),
    "lora": ("lora", "fine-tune the text-to-image model", ("device", "dtype")),
    "cost": ("cost", "GPU-hours and disk space, by arithmetic", ()),
}
_DTYPES = ("auto", "float32", "float16", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all its stages."""
    parser = argparse.ArgumentParser(
        prog="fafa-syncpr", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, (module_name, summary, common) in _STAGES.items():
        module = import_module(f"fafa.syncpr.{module_name}")
        stage = stages.add_parser(
            name, help=summary, description=module.DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
        )
        if name != "cost":
            stage.add_argument("--out", required=True, help="folder that the stage writes to")
        if "shard" in common:
            stage.add_argument(
                "--shard", type=shard, default=Shard(), metavar="i/n", help="every n-th item, from the i-th"
            )
        if "device" in common:
            stage.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        if "dtype" in common:
            stage.add_argument("--dtype", choices=_DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
        module.add_flags(stage)
        stage.set_defaults(run=module.run)
    return parser


def main(argv: list[str]) -> int:
    """Run a stage; returns the exit status."""
    flags = build_parser().parse_args(argv)
    return flags.run(flags)
