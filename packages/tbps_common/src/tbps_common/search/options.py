"""The flags of `tbps-index`, `tbps-search`, `tbps-compare` and `tbps-page`."""

import argparse

from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, number, whole_number

INDEX_DESCRIPTION = """\
Compute the features of pictures once, into a gallery that can be searched:

  tbps-index --model clip:ViT-B-16/openai --images FOLDER --out people.lance
  tbps-index --model cmlfa:RUN --images FOLDER --out people.lance --metadata cameras.csv

Run it again after pictures were added, changed or deleted: only those are handled. A run that was killed goes on where it
was. Several models may index into one gallery. Several machines may share the work: --shard 0/4, --shard 1/4, ...

Delete from a gallery, for all models and without a trace of the features on the disk:

  tbps-index --delete --out people.lance --path FOLDER/alice.jpg --files
  tbps-index --delete --out people.lance --where "camera = 'cam_a'"

After the folder of the pictures has moved:

  tbps-index --out people.lance --root NEW_FOLDER
"""
SEARCH_DESCRIPTION = """\
Find the pictures of a gallery that match, best first:

  tbps-search --model cmlfa:RUN --gallery people.lance --text "a man with a red backpack"
  tbps-search --model fafa:RUN --gallery people.lance --image me.jpg --text "with a black coat instead"
  tbps-search --model diana:FOLDER --gallery people.lance --dialogue dialogue.json
  ... --where "camera = 'cam_a' and time > '2026-05-01'" --output hits.png --json hits.json
"""
COMPARE_DESCRIPTION = """\
Ask several models the same queries on one gallery, and say which one finds more, with 95 % intervals over the persons:

  tbps-compare --gallery people.lance --model clip:ViT-B-16/openai --model cmlfa:RUN --queries queries.jsonl

A line of queries.jsonl asks (text, image, both, or dialogue) and says what is right (answers: paths in the gallery, or
identity: a value of the column that --identity names). A CSV file with these columns does as well:

  {"text": "a man with a red backpack", "answers": ["cam_a/17.jpg", "cam_b/4.jpg"]}
  {"image": "me.jpg", "text": "with a black coat instead", "identity": "17"}
  {"dialogue": [[{"from": "gpt", "value": "..."}, {"from": "user", "value": "..."}]], "identity": "17", "person": "17"}

Differences are those to the first model. Written to --out: comparison.json, comparison.txt, and cmc_*.png.
"""
PAGE_DESCRIPTION = """\
A page in the browser to search a gallery with words, with a picture and words, or in a chat:

  tbps-page --gallery people.lance --model cmlfa:RUN
  tbps-page --gallery people.lance --model cmlfa:RUN --model fafa:RUN --model diana:FOLDER

The gallery must have been indexed with each of the models. Of several models, those that take a question answer it side by
side. The page can be reached from this machine only, shows pictures of the gallery only, and asks nothing of the internet.
"""
MODEL_HELP = "KIND:PLACE, such as cmlfa:RUN, mra:CHECKPOINT, fafa:RUN, diana:FOLDER, clip:ViT-B-16/openai"


def index_parser() -> argparse.ArgumentParser:
    """The parser of `tbps-index`."""
    parser = argparse.ArgumentParser(
        prog="tbps-index", description=INDEX_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help=MODEL_HELP)
    add_gallery_flags(parser, required=False)
    parser.add_argument(
        "--root", metavar="DIR", help="where the folder lies that the gallery's paths are relative to, if it has moved"
    )
    add_encoding_flags(parser)
    add_model_flags(parser)
    deletion = parser.add_argument_group("delete from the gallery (needs no model)")
    add = deletion.add_argument
    add("--delete", action="store_true", help="delete what --path and --where select")
    add("--path", action="append", default=[], help="picture file, or folder with all below it; may be repeated")
    add("--where", metavar="SQL", help="condition on the columns, such as \"camera = 'cam_a'\"")
    add("--files", action="store_true", help="delete the picture files too, or the next run would index them again")
    return parser


def check_index_flags(flags: argparse.Namespace) -> None:
    """Flags that need each other.

    Raises:
        InputError: they do not fit.
    """
    if flags.delete:
        if not flags.path and flags.where is None:
            raise InputError("--delete needs --path or --where: say what to delete")
        return
    if flags.path or flags.where is not None or flags.files:
        raise InputError("--path, --where and --files belong to --delete: add it, or leave them out")
    if flags.root and not flags.images:
        return
    for name in ("model", "images"):
        if not getattr(flags, name):
            raise InputError(f"--{name} is needed to index pictures: see tbps-index --help")


def search_parser() -> argparse.ArgumentParser:
    """The parser of `tbps-search`."""
    parser = argparse.ArgumentParser(
        prog="tbps-search", description=SEARCH_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--text", default="", help="the person to look for, or with --image what is different")
    add("--image", help="picture of the person to look for")
    add("--dialogue", metavar="FILE", help="JSON: a list of rounds, each a list of messages with 'from' and 'value'")
    add("--judge", type=whole_number(0), default=0, help="hits that the model's second stage judges again (mra)")
    add_hit_flags(parser)
    add_model_flags(parser)
    return parser


def check_search_flags(flags: argparse.Namespace) -> None:
    """Flags that need each other.

    Raises:
        InputError: nothing is asked for, or two things at once.
    """
    if flags.dialogue and (flags.text or flags.image):
        raise InputError("--dialogue stands alone: leave --text and --image out")
    if not (flags.dialogue or flags.image) and not flags.text.strip():
        raise InputError("--text is empty: describe the person to look for, or give --image or --dialogue")


def compare_parser() -> argparse.ArgumentParser:
    """The parser of `tbps-compare`."""
    parser = argparse.ArgumentParser(
        prog="tbps-compare", description=COMPARE_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--gallery", default="people.lance", help="gallery that all models have indexed")
    add("--model", action="append", required=True, help=f"may be repeated: {MODEL_HELP}")
    add("--queries", required=True, metavar="FILE", help="JSON lines, or CSV with a header if its name ends so")
    add("--identity", metavar="COLUMN", help="column of the gallery's metadata that the queries' identity refers to")
    add("--where", metavar="SQL", help="condition on the gallery's columns, such as \"split = 'test'\"")
    add(
        "--join_dialogue",
        "--join-dialogue",
        action="store_true",
        help="ask models for sentences with what the user says in a dialogue, as one text",
    )
    add(
        "--by_rounds",
        "--by-rounds",
        action="store_true",
        help="ask with the first round of a dialogue, the first two, ...",
    )
    add(
        "--baselines",
        action="store_true",
        help="of a picture with a sentence, ask with each alone too, and with the sum of their scores",
    )
    add(
        "--judge",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="also let a model's second stage judge N hits (mra)",
    )
    add("--resamples", type=whole_number(1), default=2000, help="draws of persons for the intervals")
    add("--seed", type=whole_number(0), default=0, help="of these draws")
    add("--out", default="comparison", metavar="FOLDER", help="where to write")
    add_model_flags(parser)
    return parser


def add_gallery_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What is indexed, and into which gallery."""
    add = parser.add_argument
    add(
        "--images",
        required=required,
        help="folder of pictures, searched with its sub-folders, or a text file with one path per line",
    )
    add("--out", "--gallery", default="people.lance", help="gallery to write or to bring up to date")
    add("--metadata", metavar="FILE.csv", help="further columns: a CSV file with a column 'path' (camera, time, ...)")
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="only the I-th of N parts, counted from 0")
    add("--ann", action="store_true", help="then build the index for tbps-search --ann, and print its measured recall")
    add("--half", action="store_true", help="store a new gallery's features in half precision: half the disk")

    add = parser.add_argument_group("cut persons out of whole frames, and out of videos").add_argument
    add("--detect", metavar="MODEL", help="detector: a transformers folder or id, or torchvision's NAME:WEIGHTS.pth")
    add("--detect_score", type=number(0, 1), default=0.5, help="boxes with a lower score are dropped")
    add(
        "--detect_margin", type=number(0, 10), default=0.05, help="share of its size by which a box grows on every side"
    )
    add("--detect_min", type=whole_number(1), default=32, help="boxes that are less high, in pixels, are dropped")
    add("--fps", type=number(0, above=True), default=1.0, help="frames of a video that are looked at per second")


def page_parser() -> argparse.ArgumentParser:
    """The parser of `tbps-page`."""
    parser = argparse.ArgumentParser(
        prog="tbps-page", description=PAGE_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--gallery", "--index", default="people.lance", help="gallery to search")
    add("--model", action="append", required=True, help=f"{MODEL_HELP}; may be repeated")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines search the gallery too")
    add("--port", type=whole_number(0), default=7860, help="port to listen on; 0 takes a free one")
    add("--max_upload", "--max-upload", type=whole_number(1), default=20, metavar="MB", help="largest picture accepted")
    add_model_flags(parser)
    return parser


def add_encoding_flags(parser: argparse.ArgumentParser) -> None:
    """How pictures are read and encoded."""
    parser.add_argument(
        "--batch_size", "--batch-size", type=whole_number(1), help="pictures encoded at once (default: the model's)"
    )
    parser.add_argument(
        "--num_workers", "--num-workers", type=whole_number(0), default=2, help="threads that read pictures"
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Where the model computes, and what of it may be read."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument(
        "--trust_checkpoint",
        "--trust-checkpoint",
        action="store_true",
        help="read a checkpoint that could run code: only for files of your own",
    )


def add_hit_flags(parser: argparse.ArgumentParser, *, output: str | None = None) -> None:
    """Which gallery is searched, which hits are shown, and how."""
    add = parser.add_argument
    add("--gallery", "--index", default="people.lance", help="gallery to search")
    add("--topk", type=whole_number(1), default=10, help="hits to show")
    add("--where", metavar="SQL", help="condition on the gallery's columns, such as \"camera = 'cam_a'\"")
    add(
        "--ann",
        type=whole_number(0),
        nargs="?",
        const=1000,
        default=0,
        metavar="N",
        help="let the database's index propose N candidates instead of scoring every picture; more find more and take longer",
    )
    add("--output", default=output, help="picture of the hits to write, such as hits.png")
    add("--json", help="write the hits to this file")


def shard(text: str) -> tuple[int, int]:
    """argparse type: `I/N`."""
    part, slash, count = text.partition("/")
    if not (slash and part.isdecimal() and count.isdecimal() and int(part) < int(count)):
        raise argparse.ArgumentTypeError(f"expects I/N with I from 0 to N - 1, such as 0/4, not {text!r}")
    return int(part), int(count)
