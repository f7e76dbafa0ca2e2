"""Recalls and mAP of a trained model on ITCPR, as a block of text, as JSON and as pictures (`inference_fafa.py`)."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable

from fafa.evaluation import itcpr_sets, retrieval, sweep
from fafa.features import Extractor
from fafa.processors import BlipCaptionProcessor
from fafa.published import PUBLISHED
from fafa.run_directory import Hyperparameters, TrainedRun
from fafa.trained import TrainedModel, open_trained
from tbps_common.datasets import ITCPR
from tbps_common.errors import InputError
from tbps_common.files import write_json, write_text
from tbps_common.models.source import results_folder
from tbps_common.ranking import RetrievalResult
from tbps_common.report.evaluation import evaluation_from_result
from tbps_common.report.pictures import Hit, RankedQuery, cmc_curve, example_queries, ranked_list
from tbps_common.report.published import published_report
from tbps_common.run.device import allow_tf32
from tbps_common.run.logs import run_log

CMC_RANKS = 50
PICTURED_QUERIES = 6
SWEEP_COLUMNS = ("R1", "R5", "R10", "mAP", "mINP")


def infer(run: TrainedRun, itcpr: ITCPR, flags: argparse.Namespace) -> int:
    """Load, evaluate, report; returns the exit status: 1 if the result is not what `--require-published` asks for.

    Args:
        run: files of the trained model.
        itcpr: the test set.
        flags: of `fafa.options.inference_args`.

    Raises:
        InputError: the weights cannot be used, a picture cannot be read, or a k is above the number of query tokens.
    """
    values = run.hyperparameters
    for name in ("fda_k", "fda_alpha", "fd_margin"):
        print(f"{name} = {getattr(values, name)}")
    allow_tf32(flags.tf32)
    with run_log("fafa"):
        trained = open_trained(run, flags.device, trust=flags.trust_checkpoint)
        print(trained.transforms.sentence)
        tokens = trained.model.num_query_token
        if flags.fda_k_sweep and max(flags.fda_k_sweep) > tokens:
            raise InputError(
                f"--fda-k-sweep {max(flags.fda_k_sweep)} is more than the {tokens} query tokens of the model"
            )
        started = time.perf_counter()
        query_set, gallery_set = itcpr_sets(itcpr, trained.transforms.test.pixels)
        extractor = Extractor(trained.model, BlipCaptionProcessor(), flags.batch_size, flags.num_workers, progress=True)
        queries = extractor.queries(query_set, query_set.captions)
        gallery = extractor.gallery(gallery_set)
        ids = torch.as_tensor(query_set.instance_ids), torch.as_tensor(gallery_set.instance_ids)
        result = retrieval(queries, gallery, *ids, values.fda_k, max_rank=max(10, min(CMC_RANKS, len(gallery))))
        seconds = time.perf_counter() - started
        print(result.table(task="com"))
        folder = results_folder(run.directory)
        _write_results(folder, values, result, flags)
        if flags.fda_k_sweep:
            _write_sweep(folder, sweep(queries, gallery, *ids, flags.fda_k_sweep), flags.model_name)
        published = _write_report(run, trained, itcpr, result, seconds, Path(flags.report_dir or folder))
        text, status = published_report(published, flags.require_published)
        if text:
            print(text)
    return status


def _write_results(folder: Path, values: Hyperparameters, result: RetrievalResult, flags: argparse.Namespace) -> None:
    """The authors' block of text and their JSON file."""
    metrics = result.metrics
    print("ITCPR results")
    for name, key in (("Recall@1", "R1"), ("Recall@5", "R5"), ("Recall@10", "R10"), ("mAP", "mAP")):
        print(f"{name}: {metrics[key]:.4f}")
    content = {
        "model": flags.model_name,
        "dataset": flags.dataset,
        "fda_k": values.fda_k,
        "fda_alpha": values.fda_alpha,
        "fd_margin": values.fd_margin,
        "recall_at_1": metrics["R1"],
        "recall_at_5": metrics["R5"],
        "recall_at_10": metrics["R10"],
        "mAP": metrics["mAP"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"inference_results_{flags.model_name}.json"
    write_text(path, json.dumps(content, indent=4) + "\n")
    print(f"wrote {path}")


def _write_sweep(folder: Path, results: dict[int, RetrievalResult], model_name: str) -> None:
    table = PrettyTable(["fda_k", *SWEEP_COLUMNS])
    for k, result in results.items():
        table.add_row([k, *(f"{result.metrics[name]:.3f}" for name in SWEEP_COLUMNS)])
    print(table)
    path = folder / f"fda_k_sweep_{model_name}.json"
    write_json(path, {str(k): {name: result.metrics[name] for name in SWEEP_COLUMNS} for k, result in results.items()})
    print(f"wrote {path}")


def _write_report(
    run: TrainedRun, trained: TrainedModel, itcpr: ITCPR, result: RetrievalResult, seconds: float, folder: Path
) -> list[dict[str, Any]]:
    """The evaluation file that all packages share, the CMC curve, and what some queries found.

    Returns:
        The comparison with published results.
    """
    query, gallery, values = itcpr.query, itcpr.gallery, run.hyperparameters
    document = evaluation_from_result(
        folder / "evaluation.json",
        {"com": result},
        gallery=len(gallery["img_paths"]),
        package="fafa",
        dataset="ITCPR",
        split="test",
        settings={
            "fda_k": values.fda_k,
            "transform": values.transform,
            "target_ratio": values.target_ratio,
            "image_size": trained.model.settings.image_size,
            "num_query_token": trained.model.num_query_token,
        },
        checkpoint=str(run.checkpoint),
        fingerprint=trained.fingerprint,
        published=PUBLISHED,
        seconds=seconds,
    )
    title = "FAFA on ITCPR: reference image and text to gallery"
    cmc_curve(folder / "cmc.png", {"com": result.cmc[: len(gallery["img_paths"])].tolist()}, title=title)
    assert result.indices is not None and result.scores is not None
    targets = dict(zip(gallery["instance_ids"], gallery["img_paths"]))
    rows = []
    for place in example_queries(result.first_rank.tolist(), PICTURED_QUERIES):
        instance = query["instance_ids"][place]
        hits = [
            Hit(gallery["img_paths"][found], score, gallery["instance_ids"][found] == instance)
            for found, score in zip(result.indices[place].tolist(), result.scores[place].tolist())
        ]
        rows.append(RankedQuery(query["captions"][place], query["img_paths"][place], hits, targets.get(instance)))
    ranked_list(folder / "ranked_list.png", rows, title=title)
    for name in ("evaluation.json", "cmc.png", "ranked_list.png"):
        print(f"wrote {folder / name}")
    return document["published"] or []
