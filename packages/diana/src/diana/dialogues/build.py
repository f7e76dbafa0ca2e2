"""`diana-build-dialogues`: captions of pedestrian images become ChatPedes dialogues, written by a language model."""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diana.dialogues.roles import SAMPLING, Round, answer_question, ask_question, open_dialogue
from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.run.arguments import HelpFormatter, number, whole_number

if TYPE_CHECKING:
    from tbps_common.pipeline import ChatClient, Conversation, Outcome

DESCRIPTION = """\
Write dialogues about images that have captions. For each image one language model plays two roles: one asks and sees
only the dialogue, the other answers and sees only the captions. Any OpenAI-compatible server will do:

  diana-build-dialogues --captions CUHK-PEDES/reid_raw.json --split train --out train_reid.json --rounds 5 \\
    --base_url http://127.0.0.1:8000/v1 --model NAME

Every finished image is put on the disk at once (OUT.journal), so that the command can be killed and started again. Images
that failed are listed with the reason in OUT.failures.json, the exit status is then 1, and the next call tries them
again. A key, where the server wants one, is read from the environment variable OPENAI_API_KEY and nowhere else.
"""


@dataclass(frozen=True)
class CaptionedImage:
    """One record of the captions file."""

    identity: int | str
    file_path: str
    captions: list[str]


def main(argv: list[str]) -> int:
    """Parse, read, build what is missing, write."""
    flags = _parse(argv)
    images = read_captions(flags.captions, flags.split)
    if flags.limit is not None:
        images = images[: flags.limit]
    out = Path(flags.out)
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name the JSON file to write")
    from tbps_common.pipeline import ChatClient
    from tbps_common.pipeline.stages import begin_manifest, finish_manifest

    client = ChatClient(
        flags.model,
        base_url=flags.base_url,
        api_key_env=flags.api_key_env,
        concurrency=flags.concurrency,
        timeout=flags.timeout,
        deadline=flags.deadline,
        max_retries=flags.attempts - 1,
        sampling={"temperature": flags.temperature, "seed": flags.seed, **SAMPLING},
        key_optional=True,
    )
    journal = out.with_name(f"{out.name}.journal")
    settings = {"rounds": flags.rounds, "model": flags.model, "temperature": flags.temperature, "seed": flags.seed}
    begin_manifest(journal, settings)
    outcome = build(client, images, journal, rounds=flags.rounds, seed=flags.seed, attempts=flags.attempts)
    if outcome.refusal is not None:
        raise InputError(outcome.refusal)
    if outcome.interrupted is not None:
        print("stopped; the same command goes on with the missing images", file=sys.stderr)
        return outcome.exit_status
    finished = outcome.kept + outcome.done
    finish_manifest(
        journal,
        finished=not outcome.missing,
        items=outcome.items,
        kept=finished,
        dropped={"failed": outcome.missing} if outcome.missing else {},
        seconds=outcome.seconds,
    )
    _write(out, images, journal)
    return outcome.exit_status


def build(
    client: "ChatClient", images: Sequence[CaptionedImage], journal: Path, *, rounds: int, seed: int, attempts: int
) -> "Outcome":
    """Build the dialogues that the journal lacks.

    Args:
        client: asks the server; its `concurrency` is the number of images worked on at a time.
        images: all images.
        journal: file that receives every finished record.
        rounds: of each dialogue.
        seed: chooses the opening questions.
        attempts: how often one question is put, at most, while its answers do not fit.

    Returns:
        How it ended; images that failed are in the side files of `tbps_common.pipeline.run`.
    """
    from tbps_common.pipeline import Conversations, run

    async def converse(image: CaptionedImage, conversation: "Conversation") -> dict[str, Any]:
        return record(image, await dialogue(conversation, image, rounds, seed))

    places = {image.file_path: place for place, image in enumerate(images)}
    work = Conversations(
        items=images,
        keys=lambda image: (image.file_path,),
        record_key=lambda stored: stored.get("file_path"),
        converse=converse,
        describe=lambda image: {"file_path": image.file_path},
        order=lambda stored: places.get(stored.get("file_path", ""), len(places)),
    )
    return run(work, client, journal, tries=attempts, unit="image")


async def dialogue(conversation: "Conversation", image: CaptionedImage, rounds: int, seed: int) -> list[Round]:
    """One dialogue: an opening request of the prompt pool, then one attribute a round."""
    from diana.data import PROMPT_POOL

    opening = random.Random(f"{seed}:{image.file_path}").choice(PROMPT_POOL)
    turns = [_round(opening, await conversation.ask(*open_dialogue(image.captions, opening)))]
    while len(turns) < rounds:
        question = await conversation.ask(*ask_question(turns))
        turns.append(_round(question, await conversation.ask(*answer_question(image.captions, question))))
    return turns


def record(image: CaptionedImage, turns: list[Round]) -> dict[str, Any]:
    """The image's record in ChatPedes' layout."""
    return {"id": image.identity, "file_path": image.file_path, "chats": turns}


def read_captions(path: str, split: str) -> list[CaptionedImage]:
    """Records of a split of a CUHK-PEDES-like annotation file (`split` of a record may be absent).

    Raises:
        DatasetError: the file or a record cannot be used.
        InputError: the split is empty, or a file path occurs twice.
    """
    from tbps_common.datasets import iter_records

    images: dict[str, CaptionedImage] = {}
    for entry in iter_records(path):
        if split != "all" and (entry.optional_text("split") or split) != split:
            continue
        file_path, captions = entry.text("file_path"), [text for text in entry.texts("captions") if text.strip()]
        if file_path in images:
            raise InputError(f"{path}: record {entry.number} repeats the file path {file_path!r}: keep one of them")
        if not captions:
            raise InputError(f"{path}: record {entry.number} ({file_path!r}) has no caption: remove it or add one")
        images[file_path] = CaptionedImage(entry.identity("id"), file_path, captions)
    if not images:
        raise InputError(f"{path} has no record of the split {split!r}: choose another --split")
    return list(images.values())


def _round(question: str, answer: str) -> Round:
    return [{"from": "gpt", "value": question}, {"from": "user", "value": answer}]


def _write(out: Path, images: Sequence[CaptionedImage], journal: Path) -> None:
    """The annotation file, and beside it the reasons of images that are not in it."""
    wanted = {image.file_path for image in images}
    finished = [stored for stored in _lines(journal) if stored.get("file_path") in wanted]
    write_json(out, finished)
    sides = [journal.with_name(f"{journal.name}.{fate}.jsonl") for fate in ("rejected", "failed")]
    failures = {entry["file_path"]: entry["reason"] for side in sides for entry in _lines(side)}
    listed = out.with_name(f"{out.name}.failures.json")
    if not failures:
        listed.unlink(missing_ok=True)
        print(f"{out}: {len(finished)} dialogues")
        return
    write_json(listed, failures)
    for side in sides:
        side.unlink(missing_ok=True)
    first = next(iter(failures.items()))
    print(
        f"error: {len(failures)} of {len(images)} images failed ({first[0]}: {first[1]}); {out} holds the other "
        f"{len(finished)}, {listed} the reasons: run the same command again to try them again",
        file=sys.stderr,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The readable records of a journal; none if there is no such file."""
    from tbps_common.pipeline.journal import read_json_lines

    return [entry for _, entry in read_json_lines(path) if isinstance(entry, dict)] if path.exists() else []


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="diana-build-dialogues", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--captions", required=True, metavar="FILE", help="JSON list of records with id, file_path, captions, split")
    add("--split", default="train", help="records to use; all: every one")
    add("--out", required=True, metavar="FILE", help="ChatPedes annotation file to write")
    add("--rounds", type=whole_number(1), default=5, help="questions and answers per dialogue")
    add("--limit", type=whole_number(1), metavar="N", help="only the first N images")
    server = parser.add_argument_group("language model")
    add = server.add_argument
    add("--model", "--llm_model", required=True, help="name that the server knows")
    add("--base_url", "--llm_base_url", help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    add("--api_key_env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable that holds the key")
    add("--temperature", type=number(0), default=0.0, help="0: the most probable words")
    add("--seed", type=whole_number(0), default=0, help="of the opening questions, and of servers that have one")
    add("--concurrency", type=whole_number(1), default=8, help="images worked on at a time")
    add("--timeout", type=number(0, above=True), default=60.0, help="seconds one request may take")
    add("--deadline", type=number(0, above=True), default=300.0, help="seconds one image may take in all")
    add("--attempts", type=whole_number(1), default=6, help="requests for one answer before the image fails")
    return parser.parse_args(argv)
