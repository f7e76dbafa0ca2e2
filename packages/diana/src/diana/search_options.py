"""The flags of `diana-index` and `diana-chat`."""

import argparse
from collections.abc import Sequence

from tbps_common.pipeline import request_fields
from tbps_common.run.arguments import HelpFormatter, number, whole_number
from tbps_common.search.options import add_gallery_flags

INDEX_DESCRIPTION = """\
Compute the features of all images of a folder once, for diana-chat:

  diana-index --pretrained work_dirs/finetune --images my_pictures --out people.lance

A gallery that exists is brought up to date with the folder: see tbps-index --help.
"""
CHAT_DESCRIPTION = """\
Find a person by answering questions; after every answer the best pictures are listed and drawn.

  diana-index --pretrained work_dirs/finetune --images my_pictures --out people.lance
  diana-chat  --pretrained work_dirs/finetune --gallery people.lance

Besides answers it understands: undo (take the last answer back), reset (start over), quit. An empty answer quits too.
Questions come from the offline questioner, which asks what is expected to narrow the candidates down most, or from a
language model: --base_url http://127.0.0.1:8000/v1 --model NAME (a key, if needed, from OPENAI_API_KEY).
"""
# Of ChatPedes, which the fine-tuned model was trained with.
MEAN = (0.38901278, 0.3651612, 0.34836376)
STD = (0.24344306, 0.23738699, 0.23368555)


def parse_index_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of `diana-index`."""
    parser = argparse.ArgumentParser(
        prog="diana-index", description=INDEX_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--pretrained", required=True, metavar="DIR", help="checkpoint folder")
    add_gallery_flags(parser)
    add("--mode", choices=("global", "all"), default="global", help="all: with attributes, for better ranking")
    add("--batch_size", type=whole_number(1), default=128, help="images encoded at once")
    add("--num_workers", type=whole_number(0), default=0, help="processes that read images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--dtype", choices=("checkpoint", "fp32", "bf16"), default="checkpoint", help="precision of the model")
    _add_colour_flags(parser)
    return parser.parse_args(argv)


def parse_chat_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags of `diana-chat`."""
    parser = argparse.ArgumentParser(
        prog="diana-chat", description=CHAT_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--pretrained", required=True, metavar="DIR", help="checkpoint folder that the gallery was made with")
    add("--gallery", "--index", default="people.lance", help="gallery of diana-index or tbps-index")
    add("--where", metavar="SQL", help="condition on the gallery's columns, such as \"camera = 'cam_a'\"")
    add("--rounds", type=whole_number(1), default=5, help="maximum number of questions")
    add("--topk", type=whole_number(1), default=10, help="pictures shown per round")
    add("--out_dir", default="chat", metavar="DIR", help="folder for round_N.png and dialogue.json")
    add("--max_seq_length", type=whole_number(8), default=400, help="tokens the model reads")
    add("--text_batch_size", type=whole_number(1), default=128, help="hypothetical dialogues encoded at once")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add(
        "--questioner",
        choices=("information", "fixed"),
        default="information",
        help="offline questions: the most informative one next, or a fixed order",
    )
    _add_colour_flags(parser)
    server = parser.add_argument_group("questions from a language model")
    add = server.add_argument
    add(
        "--base_url", "--llm_base_url", metavar="URL", help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1"
    )
    add("--model", "--llm_model", metavar="NAME", help="model name on the server")
    add("--api_key_env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable that holds the key")
    add("--timeout", type=number(0, above=True), default=60.0, help="seconds to wait for a question")
    add(
        "--request_fields",
        type=request_fields,
        metavar="JSON",
        help='fields of the request to add or change, null to leave one out: {"max_tokens": 2000} for a reasoning model',
    )
    return parser.parse_args(argv)


def _add_colour_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mean", type=number(), nargs=3, default=list(MEAN), help="mean of the training images: red green blue")
    add(
        "--std",
        type=number(0, above=True),
        nargs=3,
        default=list(STD),
        help="standard deviation of the training images: red green blue",
    )
