"""Asking a gallery: queries in, hits out, and the next question of a conversation."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image

from tbps_common.errors import InputError
from tbps_common.images import read_image
from tbps_common.search.detect import video_frame
from tbps_common.search.gallery import Gallery, Hit, hits_of, read_rows
from tbps_common.search.rank import rank
from tbps_common.search.retriever import Query, Retriever, Round, encode_queries

# How many pictures a conversation keeps in mind when it chooses the next question.
CANDIDATES = 256


def search(
    gallery: Gallery,
    model: Retriever,
    queries: Sequence[Query],
    *,
    topk: int = 10,
    where: str | None = None,
    ann: int = 0,
    judge: int = 0,
) -> list[list[Hit]]:
    """The best pictures for each query.

    Args:
        gallery: of the same model (`open_gallery(path, model)`).
        model: encodes the queries.
        queries: all of one kind.
        topk: pictures per query.
        where: SQL condition on the gallery's columns, such as `camera = 'cam_a'`.
        ann: candidates per query that the database's index proposes; 0 scores every picture.
        judge: how many of the best pictures the model's second stage judges; 0 leaves it out.

    Raises:
        InputError: the model does not take such queries, has no second stage, or `where` is no condition.
    """
    if judge and model.judge is None:
        raise InputError(f"{model.name} has no second stage that could judge the best pictures")
    features = encode_queries(model, queries)
    scores, rows, lowest = rank(gallery, features, max(topk, judge), where=where, ann=ann, device=model.device)
    found = []
    for number, query in enumerate(queries):
        kept = rows[number] >= 0  # with an index, queries may have unequally many candidates
        hits = hits_of(gallery, rows[number][kept].tolist(), scores[number][kept].tolist())
        if judge and hits and model.judge is not None:
            pictures = [picture_of(hit) for hit in hits[:judge]]
            with torch.inference_mode():
                judged = model.judge(query, pictures, scores[number][kept], float(lowest[number])).cpu()
            values, order = judged.sort(descending=True, stable=True)
            hits = [replace(hits[place], score=value) for place, value in zip(order.tolist(), values.tolist())]
        found.append(hits[:topk])
    return found


def picture_of(hit: Hit) -> Image.Image:
    """The person's picture of a hit, as a viewer shows it.

    Raises:
        DatasetError: the file is gone or cannot be read.
    """
    image = frame_of(hit)
    return image if hit.box is None else image.crop(hit.box)


def frame_of(hit: Hit) -> Image.Image:
    """The whole picture, or the video's frame, that a hit was cut out of; errors as for `picture_of`."""
    return read_image(hit.path, as_shown=True) if hit.frame is None else video_frame(hit.path, hit.frame)


def next_question(
    gallery: Gallery, model: Retriever, rounds: Sequence[Round], *, where: str | None = None
) -> str | None:
    """What to ask next in a conversation, or None if nothing is left to ask.

    Args:
        gallery: of the same model.
        model: of the conversation.
        rounds: of question and answer so far.
        where: SQL condition on the gallery's columns.

    Raises:
        InputError: the model asks no questions, or `where` is no condition.
    """
    if model.ask is None:
        raise InputError(f"{model.name} asks no questions: use a model for dialogues, such as diana:FOLDER")
    if not rounds:
        return model.ask(rounds, {})
    features = encode_queries(model, [Query(dialogue=tuple(rounds))])
    best = rank(gallery, features, CANDIDATES, where=where, device=model.device)[1][0]
    return model.ask(rounds, read_rows(gallery, best.tolist())[1] if len(best) else {})
