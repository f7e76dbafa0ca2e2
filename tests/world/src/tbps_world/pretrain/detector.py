"""Start weight `detector`: a small Grounding DINO on a convolutional backbone, for `mra-dad regions --model`.

It finds what a caption speaks of: the person, garments, shoes, bags, headwear and hair. Every place of the encoder learns
to propose the object that it lies in the middle of; the queries of the decoder, which are the best proposals, are matched
one to one (Carion et al. 2020).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from mra.dad.options import BOX_THRESHOLD, TEXT_THRESHOLD
from mra.dad.regions import clean_phrase, filter_boxes, grounding_text, intersection_over_union
from tbps_common.pipeline.models import quiet_libraries
from tbps_world.pretrain.diffusion import fit
from tbps_world.pretrain.people import Shot, shots, start_people
from tbps_world.synth.layouts.regions import SDA_LEAST_PIXELS, SDA_REGIONS
from tbps_world.synth.lexicon import lexicon
from tbps_world.tiny.dad import tokenizer
from tbps_world.tiny.mra import make_vocabulary

PEOPLE, LEFT_ASIDE = 600, 60
HEIGHT, WIDTH = 128, 64
STEPS, BATCH = 500, 16
QUERIES, DIMENSION = 24, 64
_FIXED = {101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
"""Where Grounding DINO looks for what ends a phrase, whatever the vocabulary is."""
_PROPOSERS = 5  # places that propose one object


@dataclass(frozen=True)
class Scene:
    """A picture with a caption, and what the caption speaks of.

    Attributes:
        pixels: `[3, 128, 64]` uint8.
        text: as the detector reads it.
        phrases: of the objects, lower case.
        boxes: `[N, 4]` centre x, centre y, width and height, in 0..1.
    """

    pixels: Tensor
    text: str
    phrases: list[str]
    boxes: Tensor


def train(folder: Path, *, seed: int = 0, steps: int | None = None) -> dict[str, float]:
    """Train the detector and write it in transformers' layout.

    Args:
        folder: receives it.
        seed: of everything.
        steps: updates.

    Returns:
        Average precision at an overlap of 0.5 on persons left aside, of the boxes that `mra-dad regions` keeps with its own
        thresholds, and share of the true regions among them.
    """
    people = start_people(PEOPLE + LEFT_ASIDE)
    known, unseen = scenes(shots(people[LEFT_ASIDE:])), scenes(shots(people[:LEFT_ASIDE]))
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        model, processor = _untrained()
        inputs = [_read(processor.tokenizer, scene) for scene in known]

        def loss(batch: Tensor) -> Tensor:
            chosen = [known[place] for place in batch.tolist()]
            read = [inputs[place] for place in batch.tolist()]
            outputs = model(**_inputs(processor, chosen, [ids for ids, _ in read]))
            return _loss(outputs, [scene.boxes for scene in chosen], [tokens for _, tokens in read])

        fit("detector", [model], loss, len(known), steps or STEPS, batch=BATCH, rate=1e-3)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return measure(model, processor, unseen)


def scenes(drawn: Any) -> list[Scene]:
    """Every picture with each of its captions."""
    found = []
    for shot in drawn:
        pixels = torch.from_numpy(np.ascontiguousarray(shot.drawing.picture.transpose(2, 0, 1)))
        for caption in shot.captions:
            phrases, boxes = _regions(shot, caption.phrases)
            found.append(Scene(pixels, grounding_text(caption.text), phrases, boxes))
    return found


def _regions(shot: Shot, phrases: dict[str, str]) -> tuple[list[str], Tensor]:
    seen = shot.drawing.seen
    corners = torch.tensor(list(seen.boxes.values()), dtype=torch.float)
    boxes = {"person": torch.cat([corners[:, :2].amin(dim=0), corners[:, 2:].amax(dim=0)])}
    for name in (*SDA_REGIONS, "hair"):
        if seen.pixels.get(name, 0) >= SDA_LEAST_PIXELS:
            boxes[name] = torch.tensor(seen.boxes[name], dtype=torch.float)
    named = [name for name in boxes if name in phrases]
    size = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    return [phrases[name].lower() for name in named], box_convert(
        torch.stack([boxes[name] for name in named]) / size, "xyxy", "cxcywh"
    )


def _untrained() -> tuple[Any, Any]:
    from transformers import (
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    words = vocabulary()
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "convnext",
            "hidden_sizes": [32, 48, 64, 96],
            "depths": [1, 1, 2, 1],
            "layer_scale_init_value": 0.0,
            "out_indices": [2, 3, 4],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(words),
            "hidden_size": DIMENSION,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 2 * DIMENSION,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        d_model=DIMENSION,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * DIMENSION,
        decoder_ffn_dim=2 * DIMENSION,
        num_queries=QUERIES,
        max_text_len=96,
        dropout=0.0,
        fusion_dropout=0.0,
        fusion_droppath=0.0,
        disable_custom_kernels=True,
    )
    processor = GroundingDinoImageProcessor(size={"shortest_edge": WIDTH, "longest_edge": HEIGHT})
    return GroundingDinoForObjectDetection(config), GroundingDinoProcessor(processor, tokenizer(words))


def vocabulary() -> list[str]:
    """The world's words by id, with the tokens of `_FIXED` where they must be."""
    words = iter([word for word in make_vocabulary(lexicon()) if word not in _FIXED.values()])
    return [_FIXED[place] if place in _FIXED else next(words, f"[unused{place}]") for place in range(max(_FIXED) + 1)]


def _read(reader: Any, scene: Scene) -> tuple[Tensor, Tensor]:
    """Token ids of a scene's text `[L]`, and which of them name each object, `[N, L]` 0 or 1."""
    encoded = reader(scene.text, return_offsets_mapping=True)
    tokens = torch.zeros(len(scene.phrases), len(encoded.input_ids))
    for row, phrase in zip(tokens, scene.phrases):
        start = scene.text.index(phrase)
        for place, (first, last) in enumerate(encoded.offset_mapping):
            row[place] = float(start <= first < last <= start + len(phrase))
    return torch.tensor(encoded.input_ids), tokens


def _inputs(processor: Any, chosen: Sequence[Scene], ids: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(map(len, ids))
    mean, deviation = (
        torch.tensor(value).view(3, 1, 1)
        for value in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    pixels = torch.stack([scene.pixels for scene in chosen])
    padding = processor.tokenizer.pad_token_id
    return {
        "pixel_values": (pixels.float() / 255 - mean) / deviation,
        "pixel_mask": torch.ones(len(chosen), HEIGHT, WIDTH, dtype=torch.int64),
        "input_ids": torch.stack([F.pad(row, (0, longest - len(row)), value=padding) for row in ids]),
        "attention_mask": torch.stack([torch.arange(longest) < len(row) for row in ids]).long(),
        "token_type_ids": torch.zeros(len(ids), longest, dtype=torch.int64),
    }


def _loss(outputs: Any, boxes: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Of all proposals and of the queries: which words they show, and where."""
    places = outputs.enc_outputs_coord_logits.sigmoid()
    parts = []
    for scores, found, assign in (
        (outputs.enc_outputs_class, places, _nearest_places),
        (outputs.logits, outputs.pred_boxes, _one_to_one),
    ):
        for score, box, wanted, named in zip(scores, found, boxes, tokens):
            known = score[:, : named.shape[1]]
            rows, objects = assign(known.detach(), box.detach(), wanted, named)
            target = torch.zeros_like(known)
            target[rows] = named[objects]
            classes = sigmoid_focal_loss(known, target, alpha=0.25, gamma=2, reduction="sum") / len(rows)
            corners, true = (box_convert(part, "cxcywh", "xyxy") for part in (box[rows], wanted[objects]))
            overlap = generalized_box_iou_loss(corners, true, reduction="mean")
            parts.append(classes + 5 * F.l1_loss(box[rows], wanted[objects]) + 2 * overlap)
    return 2 * torch.stack(parts).mean()


def _nearest_places(score: Tensor, box: Tensor, wanted: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    """Some proposals per object, those nearest in place and size; objects later in the list win."""
    distance = (box[:, None] - wanted[None]).abs().sum(dim=2)  # [Q, N]
    rows = distance.topk(_PROPOSERS, dim=0, largest=False).indices  # [_PROPOSERS, N]
    owner = torch.full((len(box),), -1)
    for place in distance.amin(dim=0).argsort(descending=True).tolist():
        owner[rows[:, place]] = place
    return (owner >= 0).nonzero().flatten(), owner[owner >= 0]


def _one_to_one(score: Tensor, box: Tensor, wanted: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    likely = score.sigmoid() @ named.T / named.sum(dim=1).clamp(min=1)  # [Q, N]
    cost = 5 * torch.cdist(box, wanted, p=1) / 4 - 2 * likely
    rows, objects = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(rows), torch.from_numpy(objects)


@torch.no_grad()
def measure(model: Any, processor: Any, unseen: Sequence[Scene]) -> dict[str, float]:
    """AP50 and recall of what the stage would write, an object's class being the words of its phrase."""
    model.eval()
    special = set(processor.tokenizer.all_special_tokens)
    hits: list[tuple[float, bool]] = []
    total = 0
    for first in range(0, len(unseen), 32):
        part = unseen[first : first + 32]
        outputs = model(**_inputs(processor, part, [_read(processor.tokenizer, scene)[0] for scene in part]))
        found = processor.post_process_grounded_object_detection(
            outputs, threshold=BOX_THRESHOLD, text_threshold=TEXT_THRESHOLD, target_sizes=[(HEIGHT, WIDTH)] * len(part)
        )
        for scene, regions in zip(part, found):
            kept, _ = filter_boxes(
                regions["boxes"].tolist(),
                regions["scores"].tolist(),
                [clean_phrase(phrase, special) for phrase in regions["text_labels"]],
                (WIDTH, HEIGHT),
                min_side=0.02,
                overlap=0.8,
            )
            total += len(scene.phrases)
            hits += _judged(scene, kept)
    order = sorted(hits, key=lambda hit: -hit[0])
    right = np.cumsum([hit for _, hit in order])
    precision = right / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    recall_steps = np.array([hit for _, hit in order], dtype=float) / max(total, 1)
    return {
        "AP50": float((envelope * recall_steps).sum()) if len(right) else 0.0,
        "recall": float(right[-1] / total) if len(right) else 0.0,
        "boxes per picture": len(hits) / len(unseen),
    }


def _judged(scene: Scene, kept: dict[str, Any]) -> list[tuple[float, bool]]:
    """Score of each box, and whether it lies on an object that shares most words with its phrase; each object once."""
    true = [tuple(row) for row in box_convert(scene.boxes, "cxcywh", "xyxy").tolist()]
    left, judged = set(range(len(true))), []
    for box, score, phrase in zip(kept["boxes"], kept["logits"], kept["phrases"]):
        words = set(phrase.split())
        shared = [len(words & set(other.replace("-", " ").split())) for other in scene.phrases]
        corners = tuple(box_convert(torch.tensor([box]), "cxcywh", "xyxy")[0].tolist())
        best = max(range(len(true)), key=lambda place: (shared[place], intersection_over_union(corners, true[place])))
        right = best in left and shared[best] > 0 and intersection_over_union(corners, true[best]) >= 0.5
        if right:
            left.remove(best)
        judged.append((score, right))
    return judged
