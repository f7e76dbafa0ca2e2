"""`inference_fafa.py`: recalls and mAP of a trained model on ITCPR, as a block of text, as JSON and as pictures."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fafa.preflight import check_itcpr
from fafa.trained import TrainedRun, add_loading_flags, add_run_flags, open_trained, read_run
from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, whole_number

if TYPE_CHECKING:
    from fafa.data import ITCPRDataset
    from fafa.trained import TrainedModel
    from tbps_common.ranking import RetrievalResult

DESCRIPTION = """\
Evaluate a trained model on ITCPR.

The paper's command, run from packages/fafa:

  python inference_fafa.py \\
    --exp-dir output/cpr/FAFA_experiment \\
    --model-name tuned_recall_at1_step.pt \\
    --itcpr-root /path/to/ITCPR \\
    --batch-size 256

Writes inference_results_<model-name>.json, evaluation.json, cmc.png and ranked_list.png into the run directory. A
downloaded model needs <dir>/training_hyperparameters.json and <dir>/saved_models/<file>.pt.
"""

CMC_RANKS = 50
PICTURED_QUERIES = 6


def main(argv: list[str]) -> int:
    """Parse, check the files, load, evaluate, report."""
    flags = _parse(argv)
    run = read_run(flags)
    root = flags.itcpr_root or run.hyperparameters["itcpr_root"]
    if not root:
        raise InputError(f"--itcpr-root is needed: {run.directory} records no folder of ITCPR")
    itcpr = check_itcpr(root)
    for name in ("fda_k", "fda_alpha", "fd_margin"):
        print(f"{name} = {run.hyperparameters[name]}")

    from tbps_common.run.logs import run_log

    with run_log("fafa"):
        trained = open_trained(run, flags.device, trust=flags.trust_checkpoint)
        print(trained.transforms.sentence)
        _evaluate(run, trained, itcpr, flags)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False)
    add_run_flags(parser)
    parser.add_argument("--dataset", choices=["itcpr"], default="itcpr", help="data set")
    parser.add_argument("--itcpr-root", help="ITCPR root; None: the one recorded by the training")
    add_loading_flags(parser)
    ours = parser.add_argument_group("additions of this project")
    ours.add_argument(
        "--fda-k-sweep",
        type=whole_number(1),
        nargs="+",
        metavar="K",
        help="print and write the metrics for several numbers of averaged tokens, from the same features",
    )
    ours.add_argument("--report-dir", help="folder of evaluation.json and the pictures; None: the run directory")
    return parser.parse_args(argv)


def _evaluate(run: TrainedRun, trained: "TrainedModel", itcpr: Any, flags: argparse.Namespace) -> None:
    import torch

    from fafa.data import GalleryDataset, QueryDataset
    from fafa.evaluation import retrieval, sweep
    from fafa.extraction import Extractor
    from fafa.processors import BlipCaptionProcessor

    tokens = trained.model.num_query_token
    if flags.fda_k_sweep and max(flags.fda_k_sweep) > tokens:
        raise InputError(f"--fda-k-sweep {max(flags.fda_k_sweep)} is more than the {tokens} query tokens of the model")
    query, gallery = itcpr.query, itcpr.gallery
    transform = trained.transforms.test
    extractor = Extractor(
        trained.model,
        trained.device,
        BlipCaptionProcessor(),
        batch_size=flags.batch_size,
        num_workers=flags.num_workers,
        progress=True,
    )
    started = time.perf_counter()
    query_feats = extractor.queries(
        QueryDataset(query["instance_ids"], query["img_paths"], query["captions"], transform), query["captions"]
    )
    gallery_feats = extractor.gallery(GalleryDataset(gallery["instance_ids"], gallery["img_paths"], transform))
    ids = torch.as_tensor(query["instance_ids"]), torch.as_tensor(gallery["instance_ids"])
    cmc_ranks = max(10, min(CMC_RANKS, len(gallery_feats)))
    result = retrieval(query_feats, gallery_feats, *ids, trained.model.fda_k, soft=True, max_rank=cmc_ranks)
    seconds = time.perf_counter() - started
    print(result.table(task="com"))
    _write_results(run, result, flags)
    if flags.fda_k_sweep:
        _report_sweep(run, sweep(query_feats, gallery_feats, *ids, flags.fda_k_sweep), flags.model_name)
    _report(run, trained, itcpr, result, seconds, flags)


def _write_results(run: TrainedRun, result: "RetrievalResult", flags: argparse.Namespace) -> None:
    """The authors' block of text and their JSON file."""
    from tbps_common.files import write_text

    metrics = result.metrics
    print("ITCPR results")
    for name, key in (("Recall@1", "R1"), ("Recall@5", "R5"), ("Recall@10", "R10"), ("mAP", "mAP")):
        print(f"{name}: {metrics[key]:.4f}")
    values = run.hyperparameters
    content = {
        "model": flags.model_name,
        "dataset": flags.dataset,
        "fda_k": values["fda_k"],
        "fda_alpha": values["fda_alpha"],
        "fd_margin": values["fd_margin"],
        "recall_at_1": metrics["R1"],
        "recall_at_5": metrics["R5"],
        "recall_at_10": metrics["R10"],
        "mAP": metrics["mAP"],
    }
    path = run.directory / f"inference_results_{flags.model_name}.json"
    write_text(path, json.dumps(content, indent=4) + "\n")
    print(f"wrote {path}")


def _report_sweep(run: TrainedRun, results: "dict[int, RetrievalResult]", model_name: str) -> None:
    from prettytable import PrettyTable

    from tbps_common.files import write_json

    columns = ("R1", "R5", "R10", "mAP", "mINP")
    table = PrettyTable(["fda_k", *columns])
    for k, result in results.items():
        table.add_row([k, *(f"{result.metrics[name]:.3f}" for name in columns)])
    print(table)
    path = run.directory / f"fda_k_sweep_{model_name}.json"
    write_json(path, {str(k): {name: result.metrics[name] for name in columns} for k, result in results.items()})
    print(f"wrote {path}")


def _report(
    run: TrainedRun,
    trained: "TrainedModel",
    itcpr: "ITCPRDataset",
    result: "RetrievalResult",
    seconds: float,
    flags: argparse.Namespace,
) -> None:
    """The evaluation file that all packages share, the CMC curve, and what some queries found."""
    from tbps_common.report.evaluation import evaluation_from_result
    from tbps_common.report.pictures import Hit, RankedQuery, cmc_curve, example_queries, ranked_list

    folder = Path(flags.report_dir) if flags.report_dir else run.directory
    query, gallery = itcpr.query, itcpr.gallery
    values = run.hyperparameters
    evaluation_from_result(
        folder / "evaluation.json",
        {"com": result},
        gallery=len(gallery["img_paths"]),
        package="fafa",
        dataset="ITCPR",
        split="test",
        settings={
            **{name: values[name] for name in ("fda_k", "transform", "target_ratio")},
            "image_size": trained.model.settings.image_size,
            "num_query_token": trained.model.num_query_token,
        },
        checkpoint=str(run.checkpoint),
        fingerprint=trained.fingerprint,
        seconds=seconds,
    )
    title = "FAFA on ITCPR: reference image and text to gallery"
    cmc_curve(folder / "cmc.png", {"com": result.cmc[: len(gallery["img_paths"])].tolist()}, title=title)
    assert result.indices is not None and result.scores is not None
    targets = {instance: path for instance, path in zip(gallery["instance_ids"], gallery["img_paths"])}
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
