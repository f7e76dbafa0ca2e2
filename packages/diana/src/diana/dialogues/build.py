"""`diana-build-dialogues`: captions of pedestrian images become ChatPedes dialogues, written by a language model."""

import argparse
import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diana.data.text import PROMPT_POOL
from diana.dialogues.roles import SAMPLING, Round, answer_question, ask_question, open_dialogue
from tbps_common.datasets import iter_records
from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.pipeline.chat import Conversation, in_conversations
from tbps_common.pipeline.client import ChatClient, request_fields
from tbps_common.pipeline.journal import Record, read_json_lines
from tbps_common.pipeline.stages import run_stage
from tbps_common.run.arguments import HelpFormatter, number, whole_number

DESCRIPTION = """\
Write dialogues about images that have captions. For each image one language model plays two roles: one asks and sees
only the dialogue, the other answers and sees only the captions. Any OpenAI-compatible server will do:

  diana-build-dialogues --captions CUHK-PEDES/reid_raw.json --split train --out train_reid.json --rounds 5 \\
    --base_url http://127.0.0.1:8000/v1 --model NAME

Every finished image is written to disk immediately (OUT.journal), so that the command can be killed and started again. Images
that failed are listed with the reason in OUT.failures.json, the exit status is then 1, and the next call tries them
again. A dialogue whose captions have changed since is written again. A key, where the server wants one, is read from the
environment variable OPENAI_API_KEY and nowhere else.
"""


@dataclass(frozen=True)
class CaptionedImage:
    """One record of the captions file."""

    identity: int | str
    file_path: str
    captions: list[str]

    @property
    def fingerprint(self) -> int:
        """Of the captions that a dialogue is made from."""
        return zlib.crc32("\n".join(self.captions).encode("utf-8", "surrogatepass"))


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
        flags.model,
        base_url=flags.base_url,
        api_key_env=flags.api_key_env,
        concurrency=flags.concurrency,
        timeout=flags.timeout,
        deadline=flags.deadline,
        max_retries=flags.attempts - 1,
        sampling={"temperature": flags.temperature, "seed": flags.seed, **SAMPLING},
        fields=flags.request_fields,
        key_optional=True,
    )
    by_path = {image.file_path: image for image in images}

    async def converse(item: Record, conversation: Conversation) -> Record:
        image = by_path[item["file_path"]]
        return {**item, "chats": await dialogue(conversation, image, flags.rounds, flags.seed)}

    def key(entry: Record) -> tuple[Any, Any]:
        """A dialogue belongs to the captions it was made from; before they were stored, to those that are there."""
        image = by_path.get(entry.get("file_path", ""))
        return entry.get("file_path"), entry.get("made_from", image and image.fingerprint)

    journal = out.with_name(f"{out.name}.journal")
    outcome = run_stage(
        [{"file_path": image.file_path, "made_from": image.fingerprint} for image in images],
        in_conversations(client, converse, tries=flags.attempts, begun_per_place=1),
        journal,
        key=key,
        settings={name: getattr(flags, name) for name in ("rounds", "model", "temperature", "seed")},
        unit="image",
    )
    if outcome.refusal is not None:
        raise InputError(outcome.refusal)
    if outcome.interrupted is not None:
        print("stopped; run the same command again to continue with the missing images", file=sys.stderr)
        return outcome.exit_status
    dialogues = {key(entry): entry["chats"] for entry in _read_lines(journal) if "chats" in entry}
    finished = [
        {"id": image.identity, "file_path": path, "chats": dialogues[path, image.fingerprint]}
        for path, image in by_path.items()
        if (path, image.fingerprint) in dialogues
    ]
    _write(out, finished, len(images), journal)
    return outcome.exit_status


async def dialogue(conversation: Conversation, image: CaptionedImage, rounds: int, seed: int) -> list[Round]:
    """One dialogue: an opening request of the prompt pool, then one attribute a round."""
    opening = random.Random(f"{seed}:{image.file_path}").choice(PROMPT_POOL)
    turns = [_round(opening, await conversation.ask(*open_dialogue(image.captions, opening)))]
    while len(turns) < rounds:
        question = await conversation.ask(*ask_question(turns))
        turns.append(_round(question, await conversation.ask(*answer_question(image.captions, question))))
    return turns


def read_captions(path: str, split: str) -> list[CaptionedImage]:
    """Records of a split of a CUHK-PEDES-like annotation file (`split` of a record may be absent).

    Raises:
        DatasetError: the file or a record cannot be used.
        InputError: the split is empty, or a file path occurs twice.
    """
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


def _write(out: Path, finished: list[Record], wanted: int, journal: Path) -> None:
    """The annotation file, and beside it the reasons of images that are not in it."""
    write_json(out, finished)
    sides = [journal.with_name(f"{journal.name}.{kind}.jsonl") for kind in ("rejected", "failed")]
    failures = {entry["file_path"]: entry["reason"] for side in sides for entry in _read_lines(side)}
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
        f"error: {len(failures)} of {wanted} images failed ({first[0]}: {first[1]}); {out} holds the other "
        f"{len(finished)}, {listed} the reasons: run the same command again to try them again",
        file=sys.stderr,
    )


def _read_lines(path: Path) -> list[Record]:
    """The readable records of a journal; none if there is no such file."""
    return [entry for _, entry in read_json_lines(path) if isinstance(entry, dict)] if path.exists() else []


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="diana-build-dialogues", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--captions", required=True, metavar="FILE", help="JSON list of records with id, file_path, captions, split")
    add("--split", default="train", help="split of the records to use; all: every record")
    add("--out", required=True, metavar="FILE", help="ChatPedes annotation file to write")
    add("--rounds", type=whole_number(1), default=5, help="questions and answers per dialogue")
    add("--limit", type=whole_number(1), metavar="N", help="only the first N images")
    server = parser.add_argument_group("language model")
    add = server.add_argument
    add("--model", "--llm_model", required=True, help="model name on the server")
    add("--base_url", "--llm_base_url", help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    add("--api_key_env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable that holds the key")
    add("--temperature", type=number(0), default=0.0, help="sampling temperature; 0: the most probable words")
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        help="seed of the opening questions, also sent to servers that accept one",
    )
    add(
        "--request_fields",
        type=request_fields,
        metavar="JSON",
        help='fields of the request to add or change, null to leave one out: {"max_tokens": 2000} for a reasoning model',
    )
    add("--concurrency", type=whole_number(1), default=8, help="images processed at a time")
    add("--timeout", type=number(0, above=True), default=60.0, help="seconds one request may take")
    add("--deadline", type=number(0, above=True), default=300.0, help="seconds one image may take in all")
    add("--attempts", type=whole_number(1), default=6, help="requests for one answer before the image fails")
    return parser.parse_args(argv)
