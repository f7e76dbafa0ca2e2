"""`test.py`: metrics of a trained model on the test split, as a table, as JSON and as pictures."""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from cmlfa.config import load_train_configs
from cmlfa.datasets import build_dataloader
from cmlfa.metrics import Evaluator, metrics_table
from cmlfa.model.cmlfa import resolve_precision
from cmlfa.options import Options
from cmlfa.published import PUBLISHED
from cmlfa.run_directory import find_directory
from cmlfa.trained import open_trained
from tbps_common.datasets.raw import RawDataset
from tbps_common.models.source import results_folder
from tbps_common.ranking import RetrievalResult
from tbps_common.report.evaluation import evaluation_from_result
from tbps_common.report.pictures import Hit, RankedQuery, cmc_curve, example_queries, ranked_list
from tbps_common.report.published import published_report
from tbps_common.run.device import allow_tf32, device_sentence
from tbps_common.run.logs import run_log

# The CMC curve is drawn up to this rank, or the size of a smaller gallery.
CMC_RANKS = 50
PICTURED_QUERIES = 6

logger = logging.getLogger("IRRA.test")


def test(flags: argparse.Namespace, options: Options, data: RawDataset) -> int:
    """Evaluate on the test split and write `evaluation.json`, `cmc.png`, `ranked_list.png` and `test_log.txt`.

    Args:
        flags: of `test_parser`.
        options: of the run, from `read_run`.
        data: the annotations of its data set.

    Returns:
        Exit status: 1 if the result is not what `--require_published` asks for.
    """
    directory = results_folder(find_directory(options, flags))
    if options.dataset_name != load_train_configs(flags.config_file)["dataset_name"]:
        directory /= options.dataset_name  # never over the results on the data set of the training
    report = Path(flags.report_dir or directory)
    allow_tf32(flags.tf32)
    with run_log("IRRA", "cmlfa") as log:
        trained = open_trained(flags, options)
        report.mkdir(parents=True, exist_ok=True)
        log.open(report / "test_log.txt", append=True)
        precision = resolve_precision(options.precision, options.device)
        logger.info("%s", device_sentence(options.device, trained.device, precision))
        logger.info("weights: %s", trained.checkpoint)
        image_loader, text_loader, _ = build_dataloader(options, data)
        images, texts = image_loader.dataset, text_loader.dataset

        started = time.perf_counter()
        cmc_ranks = min(CMC_RANKS, len(images))
        evaluator = Evaluator(image_loader, text_loader)
        results = evaluator.retrieve(trained.model, flags.i2t, max_rank=max(10, cmc_ranks), progress=True)
        seconds = time.perf_counter() - started
        logger.info(
            "Test Results: %s, %d captions, %d images (batch size %d, lfa_attention %s)",
            options.dataset_name,
            len(texts),
            len(images),
            options.test_batch_size,
            options.lfa_attention,
        )
        evaluator.logger.info("\n%s", metrics_table(results))

        settings = {
            "test_batch_size": options.test_batch_size,
            "lfa_attention": options.lfa_attention,
            "precision": precision,
            "img_size": list(options.img_size),
            "stride_size": options.stride_size,
            "text_length": options.text_length,
        }
        document = evaluation_from_result(
            report / "evaluation.json",
            results,
            gallery=len(images),
            package="cmlfa",
            dataset=options.dataset_name,
            split="test",
            settings=settings,
            checkpoint=str(trained.checkpoint),
            fingerprint=trained.fingerprint,
            published=PUBLISHED,
            seconds=seconds,
        )
        title = f"CMLFA on {options.dataset_name}, test split"
        curves = {task: result.cmc[:cmc_ranks].tolist() for task, result in results.items()}
        cmc_curve(report / "cmc.png", curves, title=title)
        ranked_list(report / "ranked_list.png", _pictured_queries(results["t2i"], images, texts), title=title)
        for name in ("evaluation.json", "cmc.png", "ranked_list.png"):
            logger.info("wrote %s", report / name)
        text, status = published_report(document["published"] or (), flags.require_published)
        if text:
            logger.info("%s", text)
    return status


def _pictured_queries(result: RetrievalResult, images: Any, texts: Any) -> list[RankedQuery]:
    """Rows of the ranked-list picture: queries spread over the test split, some found at rank 1 and some not."""
    assert result.indices is not None and result.scores is not None
    return [
        RankedQuery(
            text=texts.captions[query],
            hits=[
                Hit(images.img_paths[place], score, images.image_pids[place] == texts.caption_pids[query])
                for place, score in zip(result.indices[query].tolist(), result.scores[query].tolist())
            ],
        )
        for query in example_queries(result.first_rank.tolist(), PICTURED_QUERIES)
    ]
