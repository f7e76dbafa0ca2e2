"""Evaluation of a ChatPedes split: images are encoded once, dialogues once for all turn limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from diana.data.annotations import image_folder, load_annotations
from diana.data.augmentation import build_eval_transform
from diana.data.text import render_dialogue
from diana.metrics import metrics_of, warn_of_missing
from diana.model.diana import DiaNAModel
from diana.options import MODES
from diana.retrieval.dialogues import encode_turns
from diana.retrieval.images import encode_images
from diana.retrieval.scores import Features, score_rows_of
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import check_images_exist
from tbps_common.ranking import RetrievalResult, evaluate_rows


@dataclass(frozen=True)
class Evaluation:
    """Results for one turn limit.

    Attributes:
        turn_limit: rounds that were kept; all of them if not above 0.
        num_images: distinct gallery images.
        num_ids: distinct persons of the gallery.
        num_queries: dialogues.
        num_skipped: dialogues without an image of their person, which do not count.
        metrics: by row (`global`, `local`, `all`): `r1`, `r5`, `r10`, `mAP`, `mfr`.
        results: by row: ranks and best gallery positions of every query.
        queries: the texts as the model read them.
        paths: gallery images.
        image_ids: labels `[G]`.
        caption_ids: labels `[Q]`.
    """

    turn_limit: int
    num_images: int
    num_ids: int
    num_queries: int
    num_skipped: int
    metrics: dict[str, dict[str, float]]
    results: dict[str, RetrievalResult] = field(repr=False)
    queries: list[str] = field(repr=False)
    paths: list[str] = field(repr=False)
    image_ids: list[int] = field(repr=False)
    caption_ids: list[int] = field(repr=False)


def evaluate(
    model: DiaNAModel,
    tokenizer: PreTrainedTokenizerBase,
    meta: Mapping[str, Any],
    *,
    split: str = "test",
    view: Mapping[str, list[Any]] | None = None,
    turn_limits: Sequence[int] = (-1,),
    mode: str = "global",
    batch_size: int = 64,
    text_batch_size: int = 256,
    max_seq_length: int = 400,
    num_workers: int = 0,
    sim_dtype: str = "fp32",
    topk: int = 10,
    progress: bool = False,
) -> list[Evaluation]:
    """Evaluate a model on a split, for one or several dialogue lengths.

    Args:
        model: where it is, it computes; in evaluation mode meanwhile.
        tokenizer: see `diana.tokenizer.load_tokenizer`.
        meta: `mean`, `std`, `image_root`, `<split>_annotation`; see `diana.data.load_dataset_config`.
        split: of the annotation.
        view: what `diana.data.load_annotations` gave, if it was called and its images were checked already.
        turn_limits: rounds to keep, -1 for all.
        mode: `global`, `local` or `all`.
        batch_size: images at a time.
        text_batch_size: dialogues at a time.
        max_seq_length: tokens of a dialogue.
        num_workers: processes that read images.
        sim_dtype: `fp32`, or `native` to compare features in the model's own dtype as the released code does.
        topk: best gallery positions to keep for every query.
        progress: show bars on stderr.

    Returns:
        One result for each turn limit, in their order.

    Raises:
        DatasetError: annotations or images cannot be used, or there is no query.
        InputError: an unknown mode, or attributes of a model without refiner.
    """
    if mode not in MODES:
        raise InputError(f"--mode must be one of {', '.join(MODES)}, but it is {mode!r}.")
    if not turn_limits:
        raise InputError("--turn_limit needs at least one number.")
    with_attributes = mode != "global"
    if with_attributes and not model.config.enable_refiner:
        raise InputError(f"--mode {mode} needs an attribute refiner, and this model has none: use --mode global.")
    if view is None:
        view = load_annotations(meta, split)
        check_images_exist(view["images"], image_folder(meta), flag="image_root of --dataset_config_path")
    if not view["chats"]:
        raise DatasetError(f"The {split} annotation holds no dialogue, so there is nothing to retrieve with.")
    versions = [[render_dialogue(chat, limit) for limit in turn_limits] for chat in view["chats"]]

    transform = build_eval_transform(model.config.image_size, meta["mean"], meta["std"])
    batches = encode_images(
        model,
        view["images"],
        transform,
        batch_size=batch_size,
        num_workers=num_workers,
        attributes=with_attributes,
        sim_dtype=sim_dtype,
        progress=progress,
    )
    gallery = Features.joined((embeds, attributes) for _, embeds, attributes in batches)
    encoded = encode_turns(
        model,
        tokenizer,
        versions,
        max_seq_length=max_seq_length,
        batch_size=text_batch_size,
        attributes=with_attributes,
        sim_dtype=sim_dtype,
        progress=progress,
    )
    evaluations = []
    for number, limit in enumerate(turn_limits):
        rows = score_rows_of(
            Features(*encoded[number]),
            gallery,
            mode=mode,
            sim_type=model.config.refiner_config["sim_type"],
            sim_dtype=sim_dtype,
            device=model.device,
        )
        results = {
            name: evaluate_rows(
                scorer, view["caption_ids"], view["image_ids"], topk=topk, on_missing="skip", max_rank=50
            )
            for name, scorer in rows.items()
        }
        if number == 0:
            warn_of_missing(results["global"])
        evaluations.append(
            Evaluation(
                turn_limit=limit,
                num_images=len(set(view["images"])),
                num_ids=len(set(view["image_ids"])),
                num_queries=len(versions),
                num_skipped=results["global"].num_missing,
                metrics={name: metrics_of(result) for name, result in results.items()},
                results=results,
                queries=[texts[number] for texts in versions],
                paths=view["images"],
                image_ids=view["image_ids"],
                caption_ids=view["caption_ids"],
            )
        )
    return evaluations
