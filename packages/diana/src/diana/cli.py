"""Console commands of diana. Flags are parsed at once; what does the work is imported when the work begins."""

import os

from tbps_common.run.command import command


@command
def train_main(argv: list[str]) -> int:
    """`train.py`, `diana-train`: pre-train on captions or fine-tune on dialogues."""
    from diana.launch import adopt_launcher, use_one_gpu
    from diana.preflight import parse_and_check

    options, words = parse_and_check(argv)
    adopt_launcher()
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        use_one_gpu()  # before any library looks for GPUs
    from diana.train import train

    return train(options, words)


@command
def eval_main(argv: list[str]) -> int:
    """`cli.py`, `diana-eval`: evaluate checkpoints on test dialogues."""
    from diana.options import parse_eval_flags

    options = parse_eval_flags(argv)
    from diana.evaluate import evaluate_checkpoints

    return evaluate_checkpoints(options)


@command
def index_main(argv: list[str]) -> int:
    """`diana-index`: compute the features of a folder of images once."""
    from diana.search_options import parse_index_flags

    options = parse_index_flags(argv)
    from diana.search import index

    return index(options)


@command
def chat_main(argv: list[str]) -> int:
    """`diana-chat`: find a person by answering questions."""
    from diana.search_options import parse_chat_flags

    options = parse_chat_flags(argv)
    from diana.chat.session import hold_conversation

    return hold_conversation(options)


@command
def build_dialogues_main(argv: list[str]) -> int:
    """`diana-build-dialogues`: turn captions into dialogues with a language model."""
    from diana.dialogues.build import main

    return main(argv)
