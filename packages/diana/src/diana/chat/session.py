"""`diana-chat`: find a person among the pictures of an index by answering questions."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from diana.chat.questioners import FixedList, LanguageModel, Questioner, Round, make_round
from diana.data.text import PROMPT_POOL, render_dialogue
from diana.dialogues.roles import SAMPLING
from diana.model.folders import resolve_folder
from diana.search import diana_fingerprint, open_diana
from diana.tokenizer import load_tokenizer
from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.images import missing_images
from tbps_common.pipeline import ChatClient
from tbps_common.search.commands import draw_hits, print_hits
from tbps_common.search.gallery import Gallery, Hit, check_filter, find_gallery, list_galleries, open_gallery
from tbps_common.search.retriever import Query, Retriever
from tbps_common.search.search import next_question, search


class Session:
    """One conversation: the rounds so far, and what they find.

    Args:
        model: of `diana.search.open_diana`.
        gallery: its features of the pictures.
        where: SQL condition on the gallery's columns.
    """

    def __init__(self, model: Retriever, gallery: Gallery, where: str | None = None) -> None:
        self.rounds: list[Round] = []
        self.model, self.gallery, self.where = model, gallery, where

    def search(self, topk: int) -> list[Hit]:
        """Best pictures of the dialogue so far."""
        return search(self.gallery, self.model, [Query(dialogue=tuple(self.rounds))], topk=topk, where=self.where)[0]

    def next_question(self, rounds: Sequence[Round]) -> str | None:
        """The question that is expected to tell most."""
        return next_question(self.gallery, self.model, rounds, where=self.where)


def hold_conversation(flags: argparse.Namespace) -> int:
    """Check, load, talk."""
    folder = resolve_folder(flags.pretrained)
    galleries = {gallery.fingerprint for gallery in list_galleries(flags.gallery)}
    marks = {mode: diana_fingerprint(folder, mode, flags.mean, flags.std) for mode in ("all", "global")}
    mode = next((mode for mode, mark in marks.items() if mark in galleries), "all")
    check_filter(find_gallery(flags.gallery, f"diana:{flags.pretrained}", marks[mode]), flags.where)
    client = _client(flags)
    model = open_diana(
        flags.pretrained,
        device=flags.device,
        mode=mode,
        mean=flags.mean,
        std=flags.std,
        max_seq_length=flags.max_seq_length,
        text_batch_size=flags.text_batch_size,
    )
    tokenizer = load_tokenizer(folder)
    session = Session(model, open_gallery(flags.gallery, model), flags.where)
    print(f"{len(session.gallery)} pictures. Commands: undo, reset, quit.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="ignore")  # bytes of another encoding are no reason to lose the conversation
    gone = missing_images(session.gallery.files())
    if gone:
        print(
            f"note: {len(gone)} of them are no longer where they were ({gone[0]}): diana-index brings {flags.gallery} up to "
            "date",
            file=sys.stderr,
        )
    try:
        talk(session, _questioner(flags, session, client), tokenizer, flags, sys.stdin)
    finally:  # Ctrl-C is a usual way to leave
        _save(session, Path(flags.out_dir))
    return 0


def talk(session: Session, questioner: Questioner, tokenizer: Any, flags: argparse.Namespace, answers: TextIO) -> None:
    """Ask, search and show until the rounds are used up or the user has enough."""
    asked: list[str] = []  # question of every round, so that `undo` asks the same again
    while len(session.rounds) < flags.rounds:
        if len(asked) == len(session.rounds):
            question = PROMPT_POOL[0] if not session.rounds else questioner(session.rounds)
            if question is None:
                print("\nNothing is left to ask.")
                break
            asked.append(question)
        answer = _read_answer(asked[-1], answers)
        command = answer.lower()
        if command in ("", "quit"):
            break
        if command == "reset":
            session.rounds.clear()
            asked.clear()
            continue
        if command == "undo":
            if session.rounds:
                session.rounds.pop()
                del asked[len(session.rounds) + 1 :]
                print(f"Taken back; {len(session.rounds)} answer(s) left.")
            else:
                print("There is no answer to take back.")
            continue
        session.rounds.append(make_round(asked[-1], answer))
        _show(session, tokenizer, flags)


def _read_answer(question: str, answers: TextIO) -> str:
    print(f"\nASSISTANT: {question}\nUSER: ", end="", flush=True)
    line = answers.readline()
    if not answers.isatty():  # a scripted session reads like a typed one
        print(line.rstrip("\n"))
    # Characters that cannot be written again (half a surrogate pair from a broken terminal) are left out.
    return line.strip().encode("utf-8", "ignore").decode("utf-8")


def _show(session: Session, tokenizer: Any, flags: argparse.Namespace) -> None:
    tokens = len(tokenizer(render_dialogue(session.rounds), verbose=False)["input_ids"])
    if tokens > flags.max_seq_length:
        print(
            f"warning: the dialogue has {tokens} tokens, the model reads the first {flags.max_seq_length}: the latest "
            "answers are not taken into account"
        )
    hits = session.search(flags.topk)
    print()
    print_hits(hits)
    picture = Path(flags.out_dir) / f"round_{len(session.rounds)}.png"
    draw_hits(picture, Query(dialogue=tuple(session.rounds)), hits)
    print(f"     drawn in {picture}", flush=True)


def _save(session: Session, out_dir: Path) -> None:
    if session.rounds:
        write_json(out_dir / "dialogue.json", session.rounds)
        print(f"\nThe dialogue is in {out_dir / 'dialogue.json'}.")


def _questioner(flags: argparse.Namespace, session: Session, client: ChatClient | None) -> Questioner:
    offline: Questioner = FixedList() if flags.questioner == "fixed" else session.next_question
    return offline if client is None else LanguageModel(client, offline)


def _client(flags: argparse.Namespace) -> ChatClient | None:
    if flags.model is None:
        if flags.base_url is not None:
            raise InputError("--base_url needs --model: name a model that the server offers")
        return None
    return ChatClient(
        flags.model,
        base_url=flags.base_url,
        api_key_env=flags.api_key_env,
        timeout=flags.timeout,
        deadline=flags.timeout,
        sampling={"temperature": 0.0, "seed": 0, **SAMPLING},
        fields=flags.request_fields,
        key_optional=True,
    )
