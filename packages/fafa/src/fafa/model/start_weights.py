"""Where a model's first weights come from: files in LAVIS's layout, folders or hub repositories in Hugging Face's, BERT.

Order of the released code: bare ViT file, BERT for the Q-Former, then the file of the whole model over both. The last is
read first here, so that what it replaces anyway need not be fetched.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from fafa.model.layout import POSITION_IDS, layout
from fafa.model.settings import HF_PREFIX
from fafa.model.weights import (
    LoadResult,
    StateDictMismatch,
    load_official_state_dict,
    load_weights,
    official_state_dict,
)
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file

if TYPE_CHECKING:
    from fafa.model.backbone import Blip2

logger = logging.getLogger("fafa.model")


def load_start_weights(model: "Blip2") -> bool:
    """Load what the model's settings name; nothing if neither `load_pretrained` nor `load_finetuned` is set.

    Returns:
        Whether all weights of the ViT were loaded.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    settings = model.settings
    if not settings.load_pretrained and not settings.load_finetuned:
        return False
    start = settings.finetuned if settings.load_finetuned else settings.pretrained
    state = read_state(start, model) if start else {}
    wanted = [entry.official for entry in layout(settings) if entry.official != POSITION_IDS and entry.twin is None]
    has_vit = not _lacks(state, wanted, "visual_encoder.")
    if settings.vit_weights and not has_vit:
        _load_vit(model, settings.vit_weights)
        has_vit = True
    if settings.qformer.init_from and _lacks(state, wanted, "Qformer.bert."):
        _load_bert(model, settings.qformer.init_from)
    if not start:
        return has_vit
    try:
        result = load_official_state_dict(model, state)
    except StateDictMismatch as error:
        raise StateDictMismatch(f"{start}: {error}") from None
    if len(result.missing_keys) >= len(wanted):
        raise StateDictMismatch(f"{start} holds no weight of this model: give a file in LAVIS's layout.")
    missing = [key for key in result.missing_keys if not key.startswith(("visual_encoder.", "mlm_predictor."))]
    if missing:
        logger.warning("%s lacks %d weights that keep their first values, such as %s.", start, len(missing), missing[0])
    return has_vit


def _lacks(state: Mapping[str, Tensor], wanted: list[str], prefix: str) -> bool:
    return any(key not in state for key in wanted if key.startswith(prefix))


def load_checkpoint(
    model: nn.Module, path_or_url: str | os.PathLike[str], strict: bool = False, *, trust: bool = False
) -> LoadResult:
    """Load a checkpoint: `{"model": ...}`, `{"state_dict": ...}` or bare, torch or safetensors, path or https URL.

    Args:
        model: receives the weights; see `load_official_state_dict` for what may differ.
        path_or_url: the file.
        strict: a missing or unexpected key is an error.
        trust: unpickle without any restriction (`--trust-checkpoint`).

    Returns:
        Missing and unexpected keys.

    Raises:
        CheckpointError: the file is missing, damaged, or holds tensors of other shapes; with `strict`, other keys
            (that one is a RuntimeError too).
    """
    path = local_file(path_or_url)
    return load_weights(model, load_checkpoint_file(path, trust=trust, mmap=True), str(path), strict)


def read_state(source: str, model: "Blip2") -> dict[str, Tensor]:
    """State dict in official layout from a path, a URL, or `hf:` and a repository or folder."""
    if source.startswith(HF_PREFIX):
        from fafa.model.hf_layout import read_hf

        return read_hf(source.removeprefix(HF_PREFIX), model.settings, len(model.tokenizer))
    path = local_file(source)
    return find_state_dict(load_checkpoint_file(path, mmap=True), source=str(path))[0]


def local_file(source: str | os.PathLike[str]) -> Path:
    """A path as it is; a URL as the file in torch's checkpoint cache, downloaded if it is not there.

    The cache is LAVIS's: `$TORCH_HOME/hub/checkpoints`, by file name.

    Raises:
        CheckpointError: the scheme is not https, or the download failed.
    """
    text = os.fspath(source)
    parts = urlparse(text)
    if "://" not in text:
        return Path(text).expanduser()
    if parts.scheme != "https":
        raise CheckpointError(f"{text}: weights are fetched over https only; download the file and give its path.")
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(parts.path).name
    if target.is_file():
        return target
    remedy = f"download it by other means and put it at {target}"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise CheckpointError(f"{text} is not in the cache and HF_HUB_OFFLINE forbids downloads; {remedy}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(text, str(target))
    except (URLError, OSError) as error:
        raise CheckpointError(f"{text} could not be downloaded ({error}); {remedy}.") from error
    return target


def _load_vit(model: "Blip2", source: str) -> None:
    """A file of the bare ViT: keys without prefix; its further blocks, final norm and heads are left out."""
    path = local_file(source)
    state, _ = find_state_dict(load_checkpoint_file(path, mmap=True), source=str(path))
    prefix = "visual_encoder."
    known = {entry.official for entry in layout(model.settings) if entry.official.startswith(prefix)}
    state = {prefix + key: value for key, value in state.items() if prefix + key in known}
    absent = sorted(known - set(state))
    if absent:
        raise CheckpointError(f"{path} lacks {absent[0].removeprefix(prefix)} and is therefore no ViT of this model.")
    try:
        load_official_state_dict(model, state)
    except StateDictMismatch as error:
        raise StateDictMismatch(f"{path}: {error}") from None


def _load_bert(model: "Blip2", source: str) -> None:
    """BERT's weights where the names agree; query blocks as copies of the text blocks."""
    from transformers import BertForMaskedLM

    try:
        bert = BertForMaskedLM.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The Q-Former's first weights '{source}' cannot be had from the hub or a folder; download that model, or "
            "set 'init_from: null' under 'qformer'."
        ) from error
    current = official_state_dict(model)
    state = {f"Qformer.{key}": value for key, value in bert.state_dict().items() if f"Qformer.{key}" in current}
    for key in ("Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions.bias"):
        if key in state:
            # BERT's vocabulary lacks [DEC]; its row stays as it was drawn.
            rows = min(len(current[key]), len(state[key]))
            state[key] = torch.cat([state[key][:rows], current[key][rows:]])
    for twin in ("weight", "bias"):
        state.pop(f"Qformer.cls.predictions.decoder.{twin}", None)
    for key in list(state):
        query = re.sub(r"(\.layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", key)
        state[query] = state[key]
    try:
        load_official_state_dict(model, state)
    except StateDictMismatch as error:
        raise StateDictMismatch(f"{source}: {error}") from None
