"""The vocabulary of BERT's tokenizer, read without loading the tokenizer."""

import os
from pathlib import Path

from tbps_common.errors import InputError

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def read_vocabulary(path: str | os.PathLike[str]) -> dict[str, int]:
    """Token -> id from the `vocab.txt` of a folder.

    Raises:
        InputError: the file is missing, is not UTF-8, or lacks one of BERT's special tokens.
    """
    file = Path(path) / "vocab.txt"
    try:
        # Lines end at \n alone: the released vocabulary has other separators among its tokens.
        lines = file.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(
            f"there is no {file}: text_encoder must name a folder with the vocab.txt of bert-base-uncased"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a vocabulary ({error}): get it again") from error
    if lines and not lines[-1]:
        lines.pop()
    vocabulary = {token.rstrip("\r"): number for number, token in enumerate(lines)}
    missing = [token for token in _SPECIAL if token not in vocabulary]
    if missing:
        raise InputError(f"{file} is missing {', '.join(missing)}: it is not the vocabulary of a BERT model")
    if len(vocabulary) != len(lines):
        raise InputError(f"{file} holds a token twice ({len(lines)} lines, {len(vocabulary)} tokens): get it again")
    return vocabulary
