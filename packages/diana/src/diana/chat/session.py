"""`diana-chat`: find a person among the pictures of an index by answering questions."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from diana.chat.gallery import Gallery, read_gallery, read_header, require_checkpoint
from diana.chat.questioners import FixedList, InformationGain, LanguageModel, Questioner, Round, make_round
from diana.data.text import PROMPT_POOL, render_dialogue
from diana.dialogues.roles import SAMPLING
from diana.model.diana import MAX_LOGIT_SCALE, load_diana
from diana.model.folders import resolve_folder
from diana.retrieval.dialogues import encode_turns
from diana.retrieval.scores import Features, score_rows_of
from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.images import missing_images
from tbps_common.pipeline import ChatClient
from tbps_common.report.pictures import Hit, RankedQuery, ranked_list
from tbps_common.run.device import choose_device


class Session:
    """One conversation: the rounds so far, and what they find.

    Args:
        model: `diana.DiaNAModel`.
        tokenizer: its tokenizer.
        gallery: the index.
        max_seq_length: tokens the model reads.
        batch_size: dialogues encoded at once.
    """

    def __init__(self, model: Any, tokenizer: Any, gallery: Gallery, *, max_seq_length: int, batch_size: int) -> None:
        self.rounds: list[Round] = []
        self.gallery = gallery
        self._model, self._tokenizer = model, tokenizer
        self._max_seq_length, self._batch_size = max_seq_length, batch_size
        self._mode = "global" if gallery.attributes is None else "all"

    @property
    def scale(self) -> float:
        """Inverse temperature of the similarities, for probabilities. In mode `all` two similarities are added."""
        scale = float(self._model.logit_scale.detach().clamp(max=MAX_LOGIT_SCALE).exp())
        return scale / (1 if self._mode == "global" else 2)

    def score(self, dialogues: Sequence[Sequence[Round]]) -> Tensor:
        """Scores `[number of dialogues, N]`. What the dialogues have in common at their beginning is computed once."""
        parts = []
        for start in range(0, len(dialogues), self._batch_size):
            versions = [render_dialogue(dialogue) for dialogue in dialogues[start : start + self._batch_size]]
            parts += encode_turns(
                self._model,
                self._tokenizer,
                [versions],
                max_seq_length=self._max_seq_length,
                batch_size=1,
                attributes=self._mode == "all",
            )
        rows = score_rows_of(
            Features.joined(parts),
            self.gallery.features,
            mode=self._mode,
            sim_type=self._model.config.refiner_config["sim_type"],
            device=self._model.device,
        )
        return rows[self._mode](0, len(dialogues)).float().cpu()

    def search(self, topk: int) -> list[tuple[str, float]]:
        """Best images of the dialogue so far with their scores; equal scores in the order of the index."""
        scores = self.score([self.rounds])[0]
        order = scores.argsort(descending=True, stable=True)[:topk].tolist()
        return [(self.gallery.paths[place], float(scores[place])) for place in order]

    def token_count(self) -> int:
        """Length of the dialogue as the model would read it."""
        return len(self._tokenizer(render_dialogue(self.rounds), verbose=False)["input_ids"])


def hold_conversation(flags: argparse.Namespace) -> int:
    """Check, load, talk."""
    folder, index = resolve_folder(flags.pretrained), Path(flags.index)
    require_checkpoint(index, read_header(index), folder)
    client = _client(flags)
    gallery = read_gallery(index)
    model, tokenizer = load_diana(folder, device=choose_device(flags.device))
    session = Session(model, tokenizer, gallery, max_seq_length=flags.max_seq_length, batch_size=flags.text_batch_size)
    print(f"{len(gallery.paths)} pictures. Commands: undo, reset, quit.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="ignore")  # bytes of another encoding are no reason to lose the conversation
    gone = missing_images(gallery.paths)
    if gone:
        print(
            f"note: {len(gone)} of them are no longer where they were ({gone[0]}): diana-index brings {index} up to date",
            file=sys.stderr,
        )
    try:
        talk(session, _questioner(flags, session, client), flags, sys.stdin)
    finally:  # Ctrl-C is a usual way to leave
        _save(session, Path(flags.out_dir))
    return 0


def talk(session: Session, questioner: Questioner, flags: argparse.Namespace, answers: TextIO) -> None:
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
        _show(session, flags)


def _read_answer(question: str, answers: TextIO) -> str:
    print(f"\nASSISTANT: {question}\nUSER: ", end="", flush=True)
    line = answers.readline()
    if not answers.isatty():  # a scripted session reads like a typed one
        print(line.rstrip("\n"))
    # Characters that cannot be written again (half a surrogate pair from a broken terminal) are left out.
    return line.strip().encode("utf-8", "ignore").decode("utf-8")


def _show(session: Session, flags: argparse.Namespace) -> None:
    tokens = session.token_count()
    if tokens > flags.max_seq_length:
        print(
            f"warning: the dialogue has {tokens} tokens, the model reads the first {flags.max_seq_length}: the latest "
            "answers are not taken into account"
        )
    hits = session.search(flags.topk)
    print()
    for rank, (path, score) in enumerate(hits, start=1):
        shown = path.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files need not be Unicode
        print(f"{rank:3d}  {score:7.4f}  {shown}")
    text = " ".join(message["value"] for turn in session.rounds for message in turn if message["from"] == "user")
    picture = Path(flags.out_dir) / f"round_{len(session.rounds)}.png"
    ranked_list(picture, [RankedQuery(text=text, hits=[Hit(path, score) for path, score in hits])])
    print(f"     drawn in {picture}", flush=True)


def _save(session: Session, out_dir: Path) -> None:
    if session.rounds:
        write_json(out_dir / "dialogue.json", session.rounds)
        print(f"\nThe dialogue is in {out_dir / 'dialogue.json'}.")


def _questioner(flags: argparse.Namespace, session: Session, client: ChatClient | None) -> Questioner:
    offline: Questioner = FixedList() if flags.questioner == "fixed" else InformationGain(session.score, session.scale)
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
