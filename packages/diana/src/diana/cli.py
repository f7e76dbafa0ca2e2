"""Console commands of diana. Heavy libraries are imported when a command starts to work, not to print its help."""

from tbps_common.run.command import command


@command
def train_main(argv: list[str]) -> int:
    """`train.py`, `diana-train`: pre-train on captions or fine-tune on dialogues."""
    from diana.training.run import main

    return main(argv)


@command
def eval_main(argv: list[str]) -> int:
    """`cli.py`, `diana-eval`: evaluate checkpoints on test dialogues."""
    from diana.evaluation import main

    return main(argv)


@command
def index_main(argv: list[str]) -> int:
    """`diana-index`: compute the features of a folder of images once."""
    from diana.chat.index import main

    return main(argv)


@command
def chat_main(argv: list[str]) -> int:
    """`diana-chat`: find a person by answering questions."""
    from diana.chat.session import main

    return main(argv)


@command
def build_dialogues_main(argv: list[str]) -> int:
    """`diana-build-dialogues`: turn captions into dialogues with a language model."""
    from diana.dialogues.build import main

    return main(argv)
