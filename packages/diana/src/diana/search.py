"""`diana-index`, and the retriever `diana:FOLDER` of `tbps-index` and the others: dialogues in, pictures out."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diana.chat.questioners import FixedList, InformationGain, make_round
from diana.data.augmentation import build_eval_transform
from diana.data.text import PROMPT_POOL, render_dialogue
from diana.model.config import DiaNAConfig
from diana.model.diana import DTYPES, MAX_LOGIT_SCALE, DiaNAModel, load_diana
from diana.model.folders import resolve_folder
from diana.retrieval.dialogues import encode_dialogues, encode_turns
from diana.retrieval.features import finished
from diana.retrieval.scores import Features as Encoded
from diana.search_options import MEAN, STD
from tbps_common.errors import InputError
from tbps_common.run.device import choose_device
from tbps_common.search.commands import run_index
from tbps_common.search.rank import scores_of
from tbps_common.search.retriever import Feature, Features, Query, Retriever, Round

# Of a weight file: enough to tell two trainings apart, few enough that a chat starts at once.
_SAMPLES, _SAMPLE_BYTES = 1024, 4096


def index(flags: argparse.Namespace) -> int:
    """Bring a gallery up to date with a folder's pictures."""
    folder = resolve_folder(flags.pretrained)
    if flags.mode == "all" and not DiaNAConfig.from_file(folder / "config.json").enable_refiner:
        raise InputError(f"--mode all needs the attribute refiner, which {folder} does not have: use --mode global")

    def open_model() -> Retriever:
        return open_diana(
            flags.pretrained,
            device=flags.device,
            mode=flags.mode,
            mean=flags.mean,
            std=flags.std,
            dtype=DTYPES[flags.dtype],
        )

    return run_index(flags, open_model, batch_size=flags.batch_size, num_workers=flags.num_workers)


def open_diana(
    place: str,
    *,
    device: str = "auto",
    trust: bool = False,
    mode: str | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dtype: torch.dtype | None = None,
    max_seq_length: int = 400,
    text_batch_size: int = 128,
) -> Retriever:
    """The model of a checkpoint folder as a retriever: cosines of global features and, in mode `all`, of attributes.

    Args:
        place: the folder.
        device: of `--device`.
        trust: unused: weights are never read in a way that could run code.
        mode: `global` or `all`; by default `all` where the model has a refiner.
        mean: of the training images.
        std: of the training images.
        dtype: of the parameters; by default the checkpoint's.
        max_seq_length: tokens of a dialogue that are read.
        text_batch_size: dialogues encoded at once.

    Raises:
        CheckpointError: the folder is missing, or its model cannot be loaded.
    """
    folder = resolve_folder(place)
    model, tokenizer = load_diana(folder, device=choose_device(device), dtype=dtype)
    mode = mode or ("all" if model.config.enable_refiner else "global")
    attributes = mode == "all"
    options: dict[str, Any] = {"max_seq_length": max_seq_length, "attributes": attributes}

    def encode_images(pictures: Tensor) -> Features:
        embeds, dense = model.encode_image(pictures)
        return _features(finished(embeds, "fp32"), finished(model.refine(dense), "fp32") if attributes else None)

    def encode_queries(queries: Sequence[Query]) -> Features:
        dialogues = [query.dialogue or (make_round(PROMPT_POOL[0], query.text),) for query in queries]
        texts = [render_dialogue(dialogue) for dialogue in dialogues]
        return _features(*encode_dialogues(model, tokenizer, texts, batch_size=text_batch_size, **options))

    def ask(rounds: Sequence[Round], candidates: Features) -> str | None:
        if not rounds:
            return PROMPT_POOL[0]
        if not candidates:
            return FixedList()(rounds)

        def score(dialogues: Sequence[Sequence[Round]]) -> Tensor:
            parts = []
            for start in range(0, len(dialogues), text_batch_size):
                # What the dialogues have in common at their beginning is computed once.
                versions = [render_dialogue(dialogue) for dialogue in dialogues[start : start + text_batch_size]]
                parts += encode_turns(model, tokenizer, [versions], batch_size=1, **options)
            joined = Encoded.joined(parts)
            return scores_of(features, _features(joined.embeds, joined.attributes), candidates, model.device).cpu()

        return InformationGain(score, _scale(model) / len(features))(rounds)

    with torch.inference_mode():
        example = _features(*encode_dialogues(model, tokenizer, ["a person"], **options))
    reduce = f"attr_{model.config.refiner_config['sim_type']}"
    features = tuple(
        Feature(name, tuple(tensor.shape[1:]), reduce="dot" if name == "feature" else reduce)
        for name, tensor in example.items()
    )
    return Retriever(
        name=f"diana:{place}",
        queries=("dialogue", "text"),
        fingerprint=diana_fingerprint(folder, mode, mean, std),
        features=features,
        device=model.device,
        transform=build_eval_transform(model.config.image_size, mean, std),
        encode_images=encode_images,
        encode_queries=encode_queries,
        batch_size=128,
        ask=ask,
    )


def diana_fingerprint(folder: Path, mode: str, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> str:
    """SHA-256 of a checkpoint's config.json, of the sizes and of evenly spread samples of its weight files, and of settings.

    Two trainings of one configuration leave files of the same size, hence the samples; hashing all of a language model
    would take longer than a conversation.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    digest.update(json.dumps([mode, list(mean), list(std)]).encode())
    return digest.hexdigest()


def _features(embeds: Tensor, attributes: Tensor | None) -> Features:
    return {"feature": embeds} if attributes is None else {"feature": embeds, "attributes": attributes}


def _scale(model: DiaNAModel) -> float:
    """Inverse temperature of the similarities, for probabilities; where several are added, each counts for a part."""
    return float(model.logit_scale.detach().clamp(max=MAX_LOGIT_SCALE).exp())
