"""ChatPedes, DiaNA's dialogues about the images of CUHK-PEDES."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from tbps_common.datasets.json_records import Files, Folder, Identity, Record, as_list, iter_records

logger = logging.getLogger("tbps_common.datasets")

Turn = list[dict[str, str]]
Dialogue = list[Turn]

_SPEAKERS = ("gpt", "user")


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """One dialogue about one image; a turn is the stored pair of a question ("gpt") and an answer ("user")."""

    image_path: str
    label: int
    turns: Dialogue


@dataclass(frozen=True, slots=True)
class ChatPedesImage:
    """One record of the file: an image with its dialogues (there may be none) and the stored id of its person."""

    image_path: str
    identity: Identity
    dialogues: list[Dialogue]
    where: str


def load_chatpedes(files: Files, image_root: str | os.PathLike[str], turn_limit: int = 0) -> list[ChatRecord]:
    """Read dialogues, one record per dialogue.

    Records without a dialogue are left out and counted in one warning. Labels number the distinct `id` of the records
    read in order of first appearance over all files.

    Args:
        files: annotation files, read in this order.
        image_root: folder of the images.
        turn_limit: keep the first n turns of each dialogue; 0 or less keeps all.

    Raises:
        DatasetError: a file or record cannot be used, or a turn is not a question followed by an answer.
    """
    records: list[ChatRecord] = []
    label_of: dict[Identity, int] = {}
    without_dialogue = 0
    for image in read_chatpedes(files, image_root):
        dialogues = [turns for turns in image.dialogues if turns]
        if not dialogues:
            without_dialogue += 1
            continue
        label = label_of.setdefault(image.identity, len(label_of))
        for turns in dialogues:
            records.append(ChatRecord(image.image_path, label, turns[:turn_limit] if turn_limit > 0 else turns))
    if without_dialogue:
        logger.warning("ChatPedes: %d records without a dialogue are left out", without_dialogue)
    return records


def read_chatpedes(
    files: Files, image_root: str | os.PathLike[str], *, pairs_only: bool = True
) -> Iterator[ChatPedesImage]:
    """Yield the records one by one, every turn checked, so that the reader decides what is kept of a million messages.

    `chats` holds one dialogue (a list of turns) or several (a list of such lists); a dialogue may have no turn.

    Args:
        files: annotation files, read in this order.
        image_root: folder of the images.
        pairs_only: every turn is one message from gpt and one from user; otherwise a turn starts with gpt, alternates,
            and has any number of messages.

    Raises:
        DatasetError: a file or record cannot be used.
    """
    folder = Folder(image_root)
    for file in as_list(files):
        for record in iter_records(file):
            path, identity = record.path("file_path", folder), record.identity("id")
            where = f"{record.file}: record {record.number} (counted from 0)"
            yield ChatPedesImage(path, identity, _dialogues(record, pairs_only), where)


def turn_problem(turn: object, *, pairs_only: bool = False) -> str | None:
    """Why a value is not a turn, as the end of a sentence; `None` if it is one. See `read_chatpedes`."""
    if type(turn) is not list or not all(type(message) is dict for message in turn):
        return "is not a list of messages {'from': ..., 'value': ...}"
    speakers = [message.get("from") for message in turn]
    if pairs_only and speakers != ["gpt", "user"]:
        return "is not a list of two messages, from gpt, then from user"
    for place, (speaker, message) in enumerate(zip(speakers, turn)):
        if speaker not in _SPEAKERS:
            return f"has a message from {speaker!r}, which is neither gpt nor user"
        if speaker != _SPEAKERS[place % 2]:
            return f"has message {place} (counted from 0) from {speaker}, but turns start with gpt and alternate"
        if type(message.get("value")) is not str:
            return f"has a message {place} (counted from 0) whose 'value' is not a string"
    return None


def _dialogues(record: Record, pairs_only: bool) -> list[Dialogue]:
    chats = record.sequence("chats", "a list of turns or of dialogues")
    if chats and type(chats[0]) is list and chats[0] and type(chats[0][0]) is dict:
        chats = [chats]
    for turns in chats:
        if type(turns) is not list:
            raise record.error("chats", "must hold a list of turns or of dialogues, each of them a list")
        for number, turn in enumerate(turns):
            problem = turn_problem(turn, pairs_only=pairs_only)
            if problem is not None:
                raise record.error("chats", f"has a turn {number} (counted from 0) that {problem}")
            for message in turn:
                record.check_characters("chats", message["value"])
    return chats
