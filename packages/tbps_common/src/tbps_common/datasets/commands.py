"""`tbps-data check | convert`.

tbps-data check --dataset CUHK-PEDES --root_dir data
tbps-data check --dataset MALS --root_dir data --images decode --workers 8 --json report.json
tbps-data convert --dataset CUHK-PEDES --root_dir data --to finetune --out data/finetune --link_images images
"""

import argparse
import logging
import os

from tbps_common.errors import DatasetError
from tbps_common.run.arguments import parser_of_commands, whole_number
from tbps_common.run.command import EXIT_FAILURE

RAW_NAMES = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
ALL_NAMES = (*RAW_NAMES, "finetune", "SDA", "SynCPR", "ITCPR", "ChatPedes", "MALS")


def build_parser() -> argparse.ArgumentParser:
    """Parser of `tbps-data`."""
    parser, (check, convert) = parser_of_commands(
        "tbps-data",
        "Check a data set before a long run, or convert raw annotations.",
        {
            "check": (
                "compare sizes with the published ones; find missing and corrupt images, shared ids, long captions",
                "Exit status: 0 if the data are usable, 1 if they are not, 2 if the annotations cannot be read. "
                "A size that differs from the published one does not make the data unusable.",
            ),
            "convert": (
                "make the processed fine-tuning files from a raw annotation tree",
                "Writes {cuhk,icfg,rstp}_{train,val,test}.json in the form that the MRA package reads.",
            ),
        },
    )
    check.add_argument("--dataset", required=True, choices=ALL_NAMES)
    check.add_argument("--root_dir", required=True, metavar="DIR", help="folder that holds the data set's folder")
    check.add_argument(
        "--images",
        choices=("none", "exist", "decode"),
        default="exist",
        help="ignore the image files, check that each exists, or decode each (default: exist)",
    )
    check.add_argument(
        "--workers",
        type=whole_number(1),
        metavar="N",
        help="threads that check images (default: one per processor, at most 8)",
    )
    check.add_argument("--json", metavar="FILE", help="also write the report to FILE")

    convert.add_argument("--dataset", required=True, choices=RAW_NAMES)
    convert.add_argument("--root_dir", required=True, metavar="DIR", help="folder that holds the data set's folder")
    convert.add_argument("--to", required=True, choices=("finetune",))
    convert.add_argument("--out", required=True, metavar="DIR", help="folder to write to, for example data/finetune")
    convert.add_argument("--link_images", metavar="DIR", help="also link the image folder into DIR, for example images")
    return parser


def main(argv: list[str]) -> int:
    """Run `tbps-data`; returns the exit status.

    Raises:
        DatasetError: the data cannot be read.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return _check(arguments) if arguments.command == "check" else _convert(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from tbps_common.datasets.check import as_text, check_dataset
    from tbps_common.files import write_json

    try:
        report = check_dataset(arguments.dataset, arguments.root_dir, arguments.images, arguments.workers)
    except DatasetError as error:
        if arguments.json:
            unread = {"dataset": arguments.dataset, "root_dir": arguments.root_dir, "usable": False}
            write_json(arguments.json, {**unread, "problems": [str(error)]})
        raise
    print(as_text(report))
    if arguments.json:
        write_json(arguments.json, report)
    return 0 if report["usable"] else EXIT_FAILURE


def _convert(arguments: argparse.Namespace) -> int:
    from tbps_common.datasets.finetune import convert_to_finetune, link_images

    for path in convert_to_finetune(arguments.dataset, arguments.root_dir, arguments.out):
        print(path)
    if arguments.link_images:
        link = link_images(arguments.dataset, arguments.root_dir, arguments.link_images)
        print(f"{link} -> {os.path.realpath(link)}")
    return 0
