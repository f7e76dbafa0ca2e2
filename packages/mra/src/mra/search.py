"""`mra-index`, `mra-search`, and the retriever `mra:CHECKPOINT` of `tbps-index` and the others."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mra.config import load_config
from mra.data.transforms import build_transforms
from mra.model.network import Retrieval
from mra.preflight import require_file
from mra.retrieval.encode import encode_images as image_features
from mra.retrieval.encode import encode_texts
from mra.retrieval.rerank import IMAGE_CHUNK, SIMILARITY_WEIGHT, Matcher, match_logits
from mra.text.augmentation import pre_caption
from mra.text.tokens import build_tokenizer, tokenize
from tbps_common.errors import CheckpointError, InputError
from tbps_common.models.source import find_model, is_hub_folder
from tbps_common.ranking import rerank
from tbps_common.run.checkpoint import find_state_dict, fingerprint, load_checkpoint_file
from tbps_common.run.device import choose_device
from tbps_common.search.commands import run_index, run_search
from tbps_common.search.retriever import Feature, Features, Query, Retriever

# What of a configuration decides the features, beside the weights.
_FEATURE_KEYS = ("h", "w", "max_tokens", "max_words", "icfg_rstp", "test_hflip")


def index(flags: argparse.Namespace) -> int:
    """Bring a gallery up to date with a folder's pictures."""
    return run_index(flags, partial(_retriever, flags), batch_size=flags.batch_size, num_workers=flags.num_workers)


def search(flags: argparse.Namespace) -> int:
    """Rank the pictures of a gallery for one sentence, print them, and draw them."""
    if not flags.text.strip():
        raise InputError("--text is empty: describe the person to look for")
    return run_search(flags, partial(_retriever, flags), Query(flags.text), judge=flags.rerank)


def _retriever(flags: argparse.Namespace) -> Retriever:
    return open_mra(
        flags.checkpoint,
        device=flags.device,
        trust=flags.trust_checkpoint,
        config_file=flags.config,
        text_encoder=flags.text_encoder,
    )


def open_mra(
    place: str,
    *,
    device: str = "auto",
    trust: bool = False,
    config_file: str | None = None,
    text_encoder: str | None = None,
) -> Retriever:
    """Build the model of a checkpoint and load its weights.

    Args:
        place: the checkpoint, or a folder in the layout of the hub or its name there.
        device: of `--device`.
        trust: read a checkpoint that could run code.
        config_file: the configuration; by default what the checkpoint holds of it.
        text_encoder: folder with vocab.txt, the only file of it that is read; by default the one in the layout of the hub,
            or else the configuration's.

    Raises:
        InputError: the configuration, the vocabulary or the device cannot be used.
        CheckpointError: the checkpoint is missing, damaged, or of another model.
    """
    where = choose_device(device)
    found = find_model(place, "--model mra:")
    require_file(found, f"checkpoint {place}", "give the weights of a trained model")
    state, rest = find_state_dict(load_checkpoint_file(found, trust=trust), source=place)
    config = load_config(config_file) if config_file else rest.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{place} holds no configuration: name the one it was trained with, such as --config configs/cuhk.yaml"
        )
    missing = [key for key in ("h", "w", "max_tokens", "max_words", "text_encoder") if key not in config]
    if missing:
        raise InputError(f"{config_file or place}: the configuration is missing {', '.join(missing)}")
    tokenizer = build_tokenizer(text_encoder or (found if is_hub_folder(found) else config["text_encoder"]))
    model = Retrieval(config, init_backbones=False)
    model.load_pretrained(state, config, is_eval=True)
    settings = {key: config.get(key) for key in _FEATURE_KEYS}
    return mra_retriever(model.to(where).eval(), config, tokenizer, f"mra:{place}", fingerprint(state, settings))


def mra_retriever(model: Retrieval, config: dict[str, Any], tokenizer: Any, name: str, mark: str) -> Retriever:
    """A trained model as a retriever: the cosine of a sentence and a picture, and the fusion encoder as its judge.

    With `test_hflip` in the configuration the features of a picture are the mean of its own and its mirror image's, as the
    released evaluation has it. With `score_world` in it, the judge combines the scores as `--score_world` does.
    """
    device = model.temp.device
    views = 2 if config.get("test_hflip") else 1
    score_world = int(config.get("score_world", 1))

    def encode_images(pictures: Tensor) -> Features:
        features = image_features(model, pictures, len(pictures))[1]
        if views == 2:
            features = (features + image_features(model, pictures.flip(3), len(pictures))[1]) / 2
        return {"feature": features}

    def encode_text(sentence: str) -> tuple[Tensor, Tensor, Tensor]:
        """Token embeddings `[1, T, D_t]`, mask `[1, T]` and unit-norm feature `[1, D]`."""
        try:
            text = pre_caption(sentence, int(config["max_words"]), bool(config.get("icfg_rstp", False)))
        except ValueError as error:
            raise InputError(f"--text cannot be used: {error}") from error
        ids, mask = (part.to(device) for part in tokenize(tokenizer, [text], int(config["max_tokens"])))
        embeds, feature = encode_texts(model, ids, mask)
        return embeds, mask, feature

    def encode_queries(queries: Sequence[Query]) -> Features:
        if queries[0].image is not None:
            pictures = [transform(query.image) for query in queries if query.image is not None]
            return encode_images(torch.stack(pictures).to(device))
        return {"feature": torch.cat([encode_text(query.text)[2] for query in queries])}

    def judge(query: Query, pictures: Sequence[Image.Image], scores: Tensor, lowest: float) -> Tensor:
        embeds, mask, _ = encode_text(query.text)
        matcher = Matcher(model, embeds, mask)
        logits: list[list[Tensor]] = [[] for _ in range(views)]
        for start in range(0, len(pictures), IMAGE_CHUNK):
            batch = torch.stack([transform(picture) for picture in pictures[start : start + IMAGE_CHUNK]]).to(device)
            for mirrored, parts in enumerate(logits):
                tokens = image_features(model, batch.flip(3) if mirrored else batch, len(batch))[0]
                parts.append(match_logits(matcher, torch.arange(len(batch))[None], tokens).cpu())
        joined = [torch.cat(parts, dim=1) for parts in logits]
        # The range of all scores of the gallery decides the weight of the similarity, so its lowest score takes part.
        everything = torch.cat([scores, scores.new_tensor([lowest])])[None]
        judged = torch.arange(len(pictures))[None]
        flipped = joined[1] if views == 2 else None
        return rerank(
            everything, judged, joined[0], itm_flip=flipped, weight=SIMILARITY_WEIGHT, legacy_world_size=score_world
        )[0, :-1]

    transform = build_transforms(config)["test"]
    with torch.inference_mode():
        width = encode_text("a person")[2].shape[1]
    return Retriever(
        name=name,
        queries=("text", "image"),
        fingerprint=mark,
        features=(Feature("feature", (width,)),),
        device=device,
        transform=transform,
        encode_images=encode_images,
        encode_queries=encode_queries,
        batch_size=int(config.get("batch_size_test", 40)),
        judge=judge,
    )
