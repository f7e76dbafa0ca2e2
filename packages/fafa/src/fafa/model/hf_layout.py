"""BLIP-2 stage-1 weights in the layout of transformers' `Blip2ForImageTextRetrieval`, read as LAVIS's."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fafa.model.layout import POSITION_IDS, QUERY_TOKENS, layout
from fafa.model.settings import ModelSettings
from tbps_common.errors import CheckpointError
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file

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
        CheckpointError: the files cannot be had, or hold another kind of model.
    """
    if settings.vit_model != "eva_clip_g":
        raise CheckpointError(f"hf:{source} holds an EVA ViT: set 'vit_model: eva_clip_g', or give a file of LAVIS.")
    found = _read_files(_folder(source))
    state: dict[str, Tensor] = {}
    for entry in layout(settings):
        key = entry.official
        if key == POSITION_IDS or entry.twin is not None:
            continue
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"hf:{source} is neither a folder nor a repository that can be fetched; download it and give its folder."
        ) from error


def _read_files(folder: Path) -> Mapping[str, Tensor]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin; give a model's folder.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(find_state_dict(load_checkpoint_file(file, mmap=True), source=str(file))[0])
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
