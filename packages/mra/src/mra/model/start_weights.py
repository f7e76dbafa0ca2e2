"""Where pre-training starts: Swin weights of ImageNet-22k and `bert-base-uncased`."""

import re
from pathlib import Path

from torch import Tensor, nn

from mra.model.text import TextEncoder
from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file, load_state_dict_strictly

_BERT_FILES = ("model.safetensors", "pytorch_model.bin")
_SWIN_URL = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth"
_SWIN_CONSTANTS = ("relative_position_index", "attn_mask")


def load_swin(encoder: nn.Module, path: str) -> None:
    """Copy the weights of an official Swin checkpoint; its classifier is left out.

    Raises:
        CheckpointError: the file is absent, damaged, or of other sizes.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"The Swin start weights {path} do not exist: download {_SWIN_URL} to that place.")
    state, _ = find_state_dict(load_checkpoint_file(path), source=path)
    state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    state = {key: tensor for key, tensor in state.items() if not key.endswith(_SWIN_CONSTANTS)}
    load_state_dict_strictly(encoder, state, source=path, may_be_missing=lambda key: key.endswith(_SWIN_CONSTANTS))


def find_bert(folder: str) -> Path:
    """The weights file in a folder in the form of Hugging Face.

    Raises:
        InputError: there is no such folder or file.
    """
    for name in _BERT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise InputError(
        f"The text encoder's folder {folder} holds neither {' nor '.join(_BERT_FILES)}: download bert-base-uncased "
        "(https://huggingface.co/bert-base-uncased/tree/main) into it."
    )


def load_bert(encoder: TextEncoder, folder: str) -> None:
    """Copy the weights of a BERT with MLM head; the cross-attention, which it lacks, keeps its random values.

    Raises:
        InputError: there is no weights file, or it does not fit `text_config`.
    """
    path = find_bert(folder)
    state, _ = find_state_dict(load_checkpoint_file(path), source=str(path))
    state = {_current_name(key): tensor for key, tensor in state.items()}
    wanted = encoder.state_dict()
    state = {key: tensor for key, tensor in state.items() if not _is_superfluous(key)}
    _check_size(state, wanted, path)
    load_state_dict_strictly(encoder, state, source=str(path), may_be_missing=_is_new)


def _current_name(key: str) -> str:
    # The oldest files have TensorFlow's names of LayerNorm.
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))


def _is_superfluous(key: str) -> bool:
    return key.startswith(("bert.pooler.", "cls.seq_relationship.")) or key == "bert.embeddings.position_ids"


def _is_new(key: str) -> bool:
    # The decoder is tied, so files need not hold it.
    return ".crossattention." in key or key.startswith("cls.predictions.decoder.") or key.endswith("position_ids")


def _check_size(state: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    table = "bert.embeddings.word_embeddings.weight"
    if table in state and state[table].shape != wanted[table].shape:
        raise CheckpointError(
            f"{path} has a table of {' x '.join(map(str, state[table].shape))} word embeddings, but text_config asks for "
            f"{' x '.join(map(str, wanted[table].shape))}: use the text_config of that model."
        )
