"""`test.py`: metrics of a trained model on the test split, as a table, as JSON and as pictures."""

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlfa.preflight import check_data
from cmlfa.trained import TrainedModel, add_run_flags, find_checkpoint, open_trained, read_run
from tbps_common.run.arguments import whole_number

if TYPE_CHECKING:
    from tbps_common.ranking import RetrievalResult
    from tbps_common.report.pictures import RankedQuery

DESCRIPTION = """\
Evaluate a trained model on the test split of its data set.

  python test.py --config_file 'path/to/model_dir/configs.yaml'

Prints the table of text-to-image retrieval and writes evaluation.json, cmc.png, ranked_list.png and test_log.txt into
the run directory. With --lfa_attention batch (the released code) the features depend on the batch they are computed in,
so the result depends on --test_batch_size.
"""

# The CMC curve is drawn up to this rank, or the size of a smaller gallery.
CMC_RANKS = 50
PICTURED_QUERIES = 6

logger = logging.getLogger("IRRA.test")


def main(argv: list[str]) -> int:
    """Parse, check the data, load, evaluate, report."""
    flags = _parse(argv)
    args = read_run(flags, ("root_dir", "test_batch_size", "num_workers"))
    check_data(args.dataset_name, args.root_dir, split="test", training=False, i2t=flags.i2t)
    directory, _ = find_checkpoint(args, flags)
    report = Path(flags.report_dir) if flags.report_dir else directory

    from tbps_common.run.logs import run_log

    with run_log("IRRA", "cmlfa") as log:
        trained = open_trained(flags, args)
        report.mkdir(parents=True, exist_ok=True)
        log.open(report / "test_log.txt", append=True)
        _test(trained, report, i2t=flags.i2t)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_run_flags(parser)
    parser.add_argument("--root_dir", help="folder that holds the data set's folder (default: as trained)")
    parser.add_argument("--test_batch_size", type=whole_number(1), help="default: as stored, 512 unless it was changed")
    parser.add_argument(
        "--num_workers", type=whole_number(0), help="processes that load the data (default: as trained)"
    )
    parser.add_argument("--i2t", action="store_true", help="evaluate image-to-text retrieval too")
    parser.add_argument("--report_dir", help="where to write the results (default: the run directory)")
    return parser.parse_args(argv)


def _test(trained: TrainedModel, report: Path, *, i2t: bool) -> None:
    from cmlfa.datasets import build_dataloader
    from cmlfa.evaluation import evaluate, metrics_table
    from cmlfa.model.cmlfa import resolve_precision
    from tbps_common.report.evaluation import evaluation_from_result
    from tbps_common.report.pictures import cmc_curve, ranked_list
    from tbps_common.run.device import device_sentence

    args = trained.args
    precision = resolve_precision(args.precision, args.device)
    logger.info("%s", device_sentence(args.device, trained.device, precision))
    logger.info("weights: %s", trained.checkpoint)
    image_loader, text_loader, _ = build_dataloader(args)
    images, texts = image_loader.dataset, text_loader.dataset

    started = time.perf_counter()
    cmc_ranks = min(CMC_RANKS, len(images))
    results = evaluate(trained.model, image_loader, text_loader, i2t=i2t, max_rank=max(10, cmc_ranks), progress=True)
    seconds = time.perf_counter() - started
    logger.info(
        "Test Results: %s, %d captions, %d images (batch size %d, lfa_attention %s)",
        args.dataset_name,
        len(texts),
        len(images),
        args.test_batch_size,
        args.lfa_attention,
    )
    logging.getLogger("IRRA.eval").info("\n%s", metrics_table(results))

    settings = {
        "test_batch_size": args.test_batch_size,
        "lfa_attention": args.lfa_attention,
        "precision": precision,
        "img_size": list(args.img_size),
        "stride_size": args.stride_size,
        "text_length": args.text_length,
    }
    evaluation_from_result(
        report / "evaluation.json",
        results,
        gallery=len(images),
        package="cmlfa",
        dataset=args.dataset_name,
        split="test",
        settings=settings,
        checkpoint=str(trained.checkpoint),
        fingerprint=trained.fingerprint,
        seconds=seconds,
    )
    title = f"CMLFA on {args.dataset_name}, test split"
    curves = {task: result.cmc[:cmc_ranks].tolist() for task, result in results.items()}
    cmc_curve(report / "cmc.png", curves, title=title)
    ranked_list(report / "ranked_list.png", pictured_queries(results["t2i"], images, texts), title=title)
    for name in ("evaluation.json", "cmc.png", "ranked_list.png"):
        logger.info("wrote %s", report / name)


def pictured_queries(
    result: "RetrievalResult", images: Any, texts: Any, count: int = PICTURED_QUERIES
) -> "list[RankedQuery]":
    """Rows of the ranked-list picture: queries spread over the test split, some found at rank 1 and some not.

    Args:
        result: text-to-image result with its best gallery positions.
        images: the gallery (`image_pids`, `img_paths`).
        texts: the queries (`caption_pids`, `captions`).
        count: rows.
    """
    from tbps_common.report.pictures import Hit, RankedQuery, example_queries

    assert result.indices is not None and result.scores is not None
    return [
        RankedQuery(
            text=texts.captions[query],
            hits=[
                Hit(images.img_paths[place], score, images.image_pids[place] == texts.caption_pids[query])
                for place, score in zip(result.indices[query].tolist(), result.scores[query].tolist())
            ],
        )
        for query in example_queries(result.first_rank.tolist(), count)
    ]
