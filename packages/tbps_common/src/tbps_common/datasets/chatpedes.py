"""ChatPedes, DiaNA's dialogues about the images of CUHK-PEDES."""

import logging
import os
from dataclasses import dataclass

from tbps_common.datasets.folder import Folder
from tbps_common.datasets.records import Files, Identity, Record, as_list, iter_records, many_objects

logger = logging.getLogger("tbps_common.datasets")

Turn = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """One dialogue about one image; a turn is the stored pair of a question ("gpt") and an answer ("user")."""

    image_path: str
    label: int
    turns: list[Turn]


def load_chatpedes(files: Files, image_root: str | os.PathLike[str], turn_limit: int = 0) -> list[ChatRecord]:
    """Read dialogues, one record per dialogue.

    `chats` holds one dialogue (a list of turns) or several (a list of such lists); records without a dialogue are left
    out and counted in one warning. Labels number the distinct `id` of the records read in order of first appearance
    over all files.

    Args:
        files: annotation files, read in this order.
        image_root: folder of the images.
        turn_limit: keep the first n turns of each dialogue; 0 or less keeps all.

    Raises:
        DatasetError: a file or record cannot be used, or a turn is not a question followed by an answer.
    """
    folder = Folder(image_root)
    records: list[ChatRecord] = []
    label_of: dict[Identity, int] = {}
    without_dialogue = 0
    with many_objects():
        for file in as_list(files):
            for record in iter_records(file):
                path, identity, chats = record.path("file_path", folder), record.identity("id"), _dialogues(record)
                if not chats:
                    without_dialogue += 1
                    continue
                label = label_of.setdefault(identity, len(label_of))
                for turns in chats:
                    records.append(ChatRecord(path, label, turns[:turn_limit] if turn_limit > 0 else turns))
    if without_dialogue:
        logger.warning("ChatPedes: %d records without a dialogue are left out", without_dialogue)
    return records


def _dialogues(record: Record) -> list[list[Turn]]:
    chats = record.sequence("chats", "a list of turns or of dialogues")
    if chats and type(chats[0]) is list and chats[0] and type(chats[0][0]) is dict:
        chats = [chats]
    for turns in chats:
        if type(turns) is not list:
            raise record.error("chats", "must hold a list of turns or of dialogues, each of them a list")
        for number, turn in enumerate(turns):
            _check_turn(record, number, turn)
    return [turns for turns in chats if turns]


def _check_turn(record: Record, number: int, turn: object) -> None:
    if type(turn) is not list or len(turn) != 2 or not all(type(message) is dict for message in turn):
        raise record.error("chats", f"has a turn {number} (counted from 0) that is not a list of two messages")
    speakers = [message.get("from") for message in turn]
    if speakers != ["gpt", "user"]:
        raise record.error("chats", f"has a turn {number} (counted from 0) that is not from gpt, then from user")
    for message in turn:
        value = message.get("value")
        if type(value) is not str:
            raise record.error("chats", f"has a turn {number} (counted from 0) whose 'value' is not a string")
        record.check_characters("chats", value)
