"""`diana-build-dialogues`: captions of pedestrian images become ChatPedes dialogues, written by a language model."""

import argparse
import queue
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diana.dialogues.client import KEY_VARIABLE, ChatClient, Deadline, ItemFailed, ServerSettings
from diana.dialogues.journal import Journal
from diana.dialogues.roles import Round, answer_question, ask_question, open_dialogue
from tbps_common.arguments import HelpFormatter, number, whole_number
from tbps_common.errors import InputError
from tbps_common.files import write_json

DESCRIPTION = f"""\
Write dialogues about images that have captions. For each image one language model plays two roles: one asks and sees
only the dialogue, the other answers and sees only the captions. Any OpenAI-compatible server will do:

  diana-build-dialogues --captions CUHK-PEDES/reid_raw.json --split train --out train_reid.json --rounds 5 \\
    --base_url http://127.0.0.1:8000/v1 --model NAME

Every finished image is put on the disk at once (OUT.journal), so that the command can be killed and started again. Images
that failed are listed with the reason in OUT.failures.json, the exit status is then 1, and the next call tries them
again. A key, where the server wants one, is read from {KEY_VARIABLE} and nowhere else.
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
    client = ChatClient(
        ServerSettings(
            model=flags.model,
            base_url=flags.base_url,
            temperature=flags.temperature,
            seed=flags.seed,
            timeout=flags.timeout,
            deadline=flags.deadline,
            attempts=flags.attempts,
        )
    )
    settings = {"rounds": flags.rounds, "model": flags.model, "temperature": flags.temperature, "seed": flags.seed}
    journal = Journal(out.with_name(out.name + ".journal"), settings)
    try:
        failures = build(client, images, journal, rounds=flags.rounds, seed=flags.seed, concurrency=flags.concurrency)
    finally:
        journal.close()
    return _write(out, images, journal, failures)


def build(
    client: ChatClient,
    images: Sequence[CaptionedImage],
    journal: Journal,
    *,
    rounds: int,
    seed: int,
    concurrency: int,
) -> dict[str, str]:
    """Build the dialogues that the journal lacks.

    Args:
        client: asks the server.
        images: all images.
        journal: receives every finished record.
        rounds: of each dialogue.
        seed: chooses the opening questions.
        concurrency: images at a time.

    Returns:
        File path -> reason, of the images that failed.

    Raises:
        InputError: the server refuses; what is finished stays in the journal.
    """
    from tqdm import tqdm

    todo: queue.SimpleQueue[CaptionedImage] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[CaptionedImage, Any]] = queue.SimpleQueue()
    missing = [image for image in images if image.file_path not in journal.items]
    for image in missing:
        todo.put(image)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                image = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((image, dialogue(client, image, rounds, seed)))
            except Exception as error:  # handed over to the main thread, which decides
                done.put((image, error))

    # Daemons: an interrupted command need not wait for answers that nobody will read.
    for _ in range(min(concurrency, len(missing))):
        threading.Thread(target=work, daemon=True).start()
    failures: dict[str, str] = {}
    try:
        for _ in tqdm(missing, desc="images", unit="image", disable=not sys.stderr.isatty()):
            image, outcome = done.get()
            if isinstance(outcome, ItemFailed):
                failures[image.file_path] = str(outcome)
            elif isinstance(outcome, Exception):
                raise outcome
            else:
                journal.add(image.file_path, record(image, outcome))
    finally:
        stop.set()
        while not done.empty():  # finished beside what ended the run
            image, outcome = done.get()
            if isinstance(outcome, list):
                journal.add(image.file_path, record(image, outcome))
    return failures


def dialogue(client: ChatClient, image: CaptionedImage, rounds: int, seed: int) -> list[Round]:
    """One dialogue: an opening request of the prompt pool, then one attribute a round."""
    from diana.data import PROMPT_POOL

    deadline = Deadline(client.settings.deadline)
    opening = random.Random(f"{seed}:{image.file_path}").choice(PROMPT_POOL)
    turns = [_round(opening, open_dialogue(client, image.captions, opening, deadline))]
    while len(turns) < rounds:
        question = ask_question(client, turns, deadline)
        turns.append(_round(question, answer_question(client, image.captions, question, deadline)))
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
    from tbps_common.datasets.records import iter_records

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


def _write(out: Path, images: Sequence[CaptionedImage], journal: Journal, failures: dict[str, str]) -> int:
    finished = [journal.items[image.file_path] for image in images if image.file_path in journal.items]
    side = out.with_name(out.name + ".failures.json")
    write_json(out, finished)
    if not failures:
        side.unlink(missing_ok=True)
        print(f"{out}: {len(finished)} dialogues")
        return 0
    write_json(side, failures)
    first = next(iter(failures.items()))
    print(
        f"error: {len(failures)} of {len(images)} images failed ({first[0]}: {first[1]}); {out} holds the other "
        f"{len(finished)}, {side} the reasons: run the same command again to try them again",
        file=sys.stderr,
    )
    return 1


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
    add("--temperature", type=number(0), default=0.0, help="0: the most probable words")
    add("--seed", type=whole_number(0), default=0, help="of the opening questions, and of servers that have one")
    add("--concurrency", type=whole_number(1), default=8, help="images worked on at a time")
    add("--timeout", type=number(0, above=True), default=60.0, help="seconds one request may take")
    add("--deadline", type=number(0, above=True), default=300.0, help="seconds one image may take in all")
    add("--attempts", type=whole_number(1), default=6, help="requests for one answer before the image fails")
    return parser.parse_args(argv)
