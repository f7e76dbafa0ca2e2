"""The WordPiece tokenizer with FAFA's extra token, from a vocabulary file, a folder or the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build_tokenizer(source: str, from_file: Callable[[Path], Any] | None = None) -> Any:
    """BERT's uncased tokenizer with `[DEC]` added behind its vocabulary.

    Args:
        source: a `vocab.txt`, a folder with one (or with a saved tokenizer), or a name on the hub.
        from_file: makes the tokenizer of a vocabulary file, for an older transformers.

    Raises:
        InputError: there is no vocabulary, or it lacks a special token.
    """
    from transformers import BertTokenizer

    path = Path(source).expanduser()
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    if vocabulary.is_file():
        words = _read_vocabulary(vocabulary)
        # The library takes the words themselves; given the file's path, it would silently ignore it.
        tokenizer = from_file(vocabulary) if from_file is not None else BertTokenizer(vocab=words)
    else:
        try:
            tokenizer = BertTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise InputError(
                f"Tokenizer '{source}' is neither a vocabulary file nor a folder with vocab.txt, and cannot be fetched from "
                "the hub; check 'tokenizer' in the model's settings, or download it first."
            ) from error
    tokenizer.truncation_side = "right"
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        # Only \n ends a line: the vocabulary of BERT holds characters that str.splitlines would split at.
        lines = path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"Vocabulary {path} is not a readable UTF-8 text file; give another one.") from error
    if lines and not lines[-1]:
        lines.pop()
    missing = [token for token in _SPECIAL if token not in lines]
    if missing:
        raise InputError(
            f"Vocabulary {path} is missing {', '.join(missing)}; give one token per line, these among them."
        )
    if len(set(lines)) < len(lines):
        first = next(token for index, token in enumerate(lines) if token in lines[:index])
        raise InputError(f"Vocabulary {path} holds {first!r} twice; give every token one line.")
    return {token: index for index, token in enumerate(lines)}
