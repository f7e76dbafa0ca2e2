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

from fafa.model.settings import HF_PREFIX, ModelSettings
from fafa.model.weights import (
    QUERY_TOKENS,
    LoadResult,
    StateDictMismatch,
    layout,
    load_from,
    official_state_dict,
    required_keys,
)
from tbps_common.errors import CheckpointError
from tbps_common.models.source import fetch
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file

if TYPE_CHECKING:
    from fafa.model.blip2 import Blip2

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
    if start and start.startswith(HF_PREFIX):
        state = read_hf(start.removeprefix(HF_PREFIX), settings, len(model.tokenizer))
    else:
        state = read_state_dict(start) if start else {}
    wanted = required_keys(settings)
    has_vit = not _lacks(state, wanted, "visual_encoder.")
    if settings.vit_weights and not has_vit:
        _load_vit(model, settings.vit_weights)
        has_vit = True
    if settings.qformer.init_from and _lacks(state, wanted, "Qformer.bert."):
        _load_bert(model, settings.qformer.init_from)
    if not start:
        return has_vit
    result = load_from(model, state, start)
    if len(result.missing_keys) >= len(wanted):
        raise StateDictMismatch(f"{start} holds no weight of this model: give a file in LAVIS's layout.")
    missing = [key for key in result.missing_keys if not key.startswith(("visual_encoder.", "mlm_predictor."))]
    if missing:
        logger.warning(
            "%s has no values for %d weights, which keep their initial values, such as %s.",
            start,
            len(missing),
            missing[0],
        )
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
    return load_from(model, read_state_dict(path, trust=trust), str(path), strict)


def read_state_dict(source: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Tensor]:
    """The tensors of a file or URL; see `load_checkpoint` for its forms and errors."""
    path = local_file(source)
    return find_state_dict(load_checkpoint_file(path, trust=trust, mmap=True), source=str(path))[0]


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
    state = read_state_dict(path)
    prefix = "visual_encoder."
    known = {entry.official for entry in layout(model.settings) if entry.official.startswith(prefix)}
    state = {prefix + key: value for key, value in state.items() if prefix + key in known}
    absent = sorted(known - set(state))
    if absent:
        raise CheckpointError(f"{path} is missing {absent[0].removeprefix(prefix)} and is not the ViT of this model.")
    load_from(model, state, str(path))


def _load_bert(model: "Blip2", source: str) -> None:
    """BERT's weights where the names agree; query blocks as copies of the text blocks."""
    from transformers import BertForMaskedLM

    try:
        bert = BertForMaskedLM.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The Q-Former's first weights '{source}' cannot be found on the hub or in a folder; download that model, or "
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
    load_from(model, state, source)


# First match wins; what follows a prefix is kept.
_PREFIXES = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
    ("visual_encoder.blocks", "vision_model.encoder.layers"),
    ("ln_vision", "vision_model.post_layernorm"),
    ("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"),
    ("Qformer.bert.embeddings", "embeddings"),
    ("Qformer.bert.encoder", "qformer.encoder"),
    ("vision_proj", "vision_projection"),
    ("text_proj", "text_projection"),
    ("itm_head", "itm_head"),
    (QUERY_TOKENS, QUERY_TOKENS),
)
_INSIDE = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
    ("attention.self.", "attention.attention."),
)


def hf_name(official: str) -> str | None:
    """Name in Hugging Face's layout; None for what it lacks. The parts of the joint qkv bias are not covered."""
    for prefix, replacement in _PREFIXES:
        if official == prefix or official.startswith(prefix + "."):
            name = replacement + official.removeprefix(prefix)
            for old, new in _INSIDE:
                name = name.replace(old, new)
            return name
    return None


def read_hf(source: str, settings: ModelSettings, vocab_size: int) -> dict[str, Tensor]:
    """State dict in official layout from a folder or hub repository with a `Blip2ForImageTextRetrieval`.

    `temp`, the language-model head and the masked-feature predictor have no counterpart and are absent.

    Args:
        source: folder, or name of a repository.
        settings: of the model that is to receive it.
        vocab_size: rows of its word embedding; further rows in the file are padding.

    Raises:
        CheckpointError: the files cannot be found, or hold another kind of model.
    """
    if settings.vit_model != "eva_clip_g":
        raise CheckpointError(f"hf:{source} holds an EVA ViT: set 'vit_model: eva_clip_g', or give a file of LAVIS.")
    found = _read_files(_folder(source))
    state: dict[str, Tensor] = {}
    for key in required_keys(settings):
        if key.endswith((".attn.q_bias", ".attn.v_bias")):
            block, _, part = key.rpartition(".attn.")
            joint = found.get(f"{hf_name(block)}.self_attn.qkv.bias")
            if joint is not None:
                state[key] = joint.chunk(3)[0 if part == "q_bias" else 2]
            continue
        name = hf_name(key)
        if name is not None and name in found:
            value = found[name]
            state[key] = value[:vocab_size] if name == "embeddings.word_embeddings.weight" else value
    if "Qformer.bert.embeddings.word_embeddings.weight" not in state:
        raise CheckpointError(
            f"hf:{source} holds no text side of the Q-Former: give a Blip2ForImageTextRetrieval, such as "
            "Salesforce/blip2-itm-vit-g (the captioning models cannot be used)."
        )
    return state


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    return fetch(source, ["*.safetensors", "*.json"], f"hf:{source}")


def _read_files(folder: Path) -> Mapping[str, Tensor]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin; give a model's folder.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_state_dict(file))
    return tensors
