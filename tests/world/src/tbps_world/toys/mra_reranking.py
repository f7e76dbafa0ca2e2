"""How many pictures MRA's matching stage judges, and how much the similarity still counts: chosen on validation persons."""

from dataclasses import dataclass
from pathlib import Path

import torch
from prettytable import PrettyTable

from mra.config import load_config
from mra.data.datasets import RetrievalTestDataset
from mra.model.network import Retrieval
from mra.retrieval.encode import encode_images, encode_texts
from mra.retrieval.metrics import retrieval_metrics
from mra.retrieval.rerank import SIMILARITY_WEIGHT, Matcher, match_logits
from mra.text.tokens import build_tokenizer, tokenize
from tbps_common.images import read_image
from tbps_common.ranking import best_of_rows, rerank
from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint
from tbps_world.toys.mra_steps import set_entry

DEPTHS = (8, 16, 32, 64)
WEIGHTS = (1, 2, 4, 8, 16, 32, 64)
"""Of the similarity, as `--score_world` counts it; 1 is the paper's formula, in which it only breaks ties."""


@dataclass(frozen=True)
class Choice:
    """Settings of the re-ranking, and R@1 and mAP on the validation persons (in percent).

    Attributes:
        score_world: for `--score_world`.
        k_test: for the configuration.
        similarity: of the similarity alone.
        reranked: with these settings.
    """

    score_world: int
    k_test: int
    similarity: dict[str, float]
    reranked: dict[str, float]


def choose_reranking(folder: Path, checkpoint: Path, chosen: Path) -> Choice:
    """Try all settings, and write the best ones where the next commands read them.

    Args:
        folder: of `mra-make-tiny`; `k_test` of its `configs/cuhk.yaml` is set.
        checkpoint: a trained model.
        chosen: receives the same with `k_test` and `score_world` in its configuration, for `tbps-compare`.
    """
    stored = load_checkpoint_file(checkpoint)
    config = {
        **load_config(folder / "configs/cuhk.yaml"),
        "text_encoder": str(folder / stored["config"]["text_encoder"]),
    }
    for key in ("vision_config", "text_config", "val_file", "image_root"):
        config[key] = str(folder / config[key])
    model = Retrieval(config, init_backbones=False)
    model.load_pretrained(stored, config, is_eval=True)
    choice = _best(model.eval(), config)
    set_entry(folder, "cuhk", "k_test", choice.k_test)
    settings = {"k_test": choice.k_test, "score_world": choice.score_world}
    save_checkpoint({**stored, "config": {**stored["config"], **settings}}, chosen)
    return choice


@torch.inference_mode()
def _best(model: Retrieval, config: dict) -> Choice:
    data = RetrievalTestDataset(config["val_file"], config)
    images = torch.stack([data.transform(picture) for picture in map(read_image, data.image_paths)])
    views = [images, images.flip(3)] if data.hflip else [images]
    encoded = [encode_images(model, view) for view in views]
    ids, atts = tokenize(build_tokenizer(config["text_encoder"]), data.text, config["max_tokens"])
    texts, text_features = encode_texts(model, ids, atts)
    similarity = text_features @ torch.stack([features for _, features in encoded]).mean(dim=0).t()
    candidates = best_of_rows(similarity, min(max(DEPTHS), len(images)))[1]
    matcher = Matcher(model, texts, atts)
    logits = [match_logits(matcher, candidates, tokens) for tokens, _ in encoded]

    def measured(depth: int, weight: int) -> dict[str, float]:
        scores = rerank(
            similarity,
            candidates[:, :depth],
            logits[0][:, :depth],
            itm_flip=logits[1][:, :depth] if len(logits) > 1 else None,
            weight=SIMILARITY_WEIGHT,
            legacy_world_size=weight,
        )
        return retrieval_metrics(scores, data.g_pids, data.q_pids)

    alone = retrieval_metrics(similarity, data.g_pids, data.q_pids)
    tried = {(depth, weight): measured(depth, weight) for depth in DEPTHS for weight in WEIGHTS}
    table = PrettyTable(["R@1 (mAP)", *(f"score_world {weight}" for weight in WEIGHTS)])
    for depth in DEPTHS:
        cells = [tried[depth, weight] for weight in WEIGHTS]
        table.add_row([f"k_test {depth}", *(f"{cell['R1']:.2f} ({cell['mAP']:.2f})" for cell in cells)])
    print(f"\nre-ranking on the validation persons; similarity alone: {alone['R1']:.2f} ({alone['mAP']:.2f})\n{table}")
    depth, weight = max(tried, key=lambda pair: tried[pair]["R1"] + tried[pair]["mAP"])  # the first of equals
    return Choice(weight, depth, alone, tried[depth, weight])
