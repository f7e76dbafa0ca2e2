"""`python packages/mra/benchmarks/bench_mra.py`: a training step and the re-ranking, this package against the direct form of the method.

The direct form is the released one: each loss makes its own passes over all tokens, keys and values of the image are
computed for every pass, negatives are drawn sample by sample with the CPU waiting, matching pairs and negatives go
through the fusion encoder in two calls; re-ranking takes one caption at a time, padded, through all layers for each of
its k images, and scores and metrics are filled row by row. Both forms use the same weights, data and attention kernels,
run interleaved in one process, and the fastest of the repeats counts. Times on the CPU are CPU times, which other
programs on the machine hardly disturb; on a GPU they are wall times. Losses, scores and metrics of both are printed
beside each other, because a saving that changes them is not one.

`--full-size --device cuda` uses the released sizes of the cuhk configuration.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import bench_mra_direct as direct_form
from mra.model.settings import PACKAGE
from tbps_common.bench.timer import measure
from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_common.run.command import command

if TYPE_CHECKING:
    from torch import Tensor

    from mra.model import Retrieval

SMALL: dict[str, Any] = {
    "vision_config": {
        "vision_width": 256, "h": 192, "w": 128, "window_size": 2, "embed_dim": 32, "depths": [2, 2, 6, 2],
        "num_heads": [1, 2, 4, 8], "drop_rate": 0.0, "drop_path_rate": 0.0,
    },
    "text_config": {
        "hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 768, "num_hidden_layers": 12,
        "fusion_layer": 6, "vocab_size": 5000, "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "embed_dim": 512, "itc_dop": 0.0, "LabelSmooth": 0.2, "temp": 0.07, "max_tokens": 56, "eda": True, "lr_2": True,
}  # fmt: skip
OPTIMIZER = {"lr": 1e-5, "weight_decay": 0.01, "lr_mult": 2, "lr_x": 2}
MASKED = 10


def build_parser() -> argparse.ArgumentParser:
    """The flags of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python packages/mra/benchmarks/bench_mra.py",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--full-size", action="store_true", help="the released model instead of a small one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--bf16", action="store_true", help="both forms under bfloat16 autocast")
    parser.add_argument("--only", choices=("training", "reranking"), help="measure one of the two (default: both)")
    parser.add_argument("--batch_size", type=whole_number(2), default=8, help="pairs per training step")
    parser.add_argument("--queries", type=whole_number(1), default=24, help="captions to re-rank for")
    parser.add_argument("--gallery", type=whole_number(1), default=32, help="images")
    parser.add_argument("--k", type=whole_number(1), default=16, help="images judged for each caption")
    parser.add_argument("--repeats", type=whole_number(1), default=3, help="timed repeats of each form")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="CPU threads")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of weights and data")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table; status 1 if the forms disagree."""
    args = build_parser().parse_args(argv)
    import torch

    from tbps_common.errors import InputError
    from tbps_common.files import write_json

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was given, but torch finds no GPU: use --device cpu.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    parts = {"training": training_step, "reranking": reranking}
    rows = [row for name, part in parts.items() if args.only in (None, name) for row in part(args)]
    size = "released size" if args.full_size else "small size"
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"{size}, batch {args.batch_size}, {args.queries} captions x {args.k} of {args.gallery} images, {where}, "
          f"{'bf16' if args.bf16 else 'fp32'}, torch {torch.__version__}")  # fmt: skip
    print(f"{'':36}{'direct form':>14}{'this package':>14}{'ratio':>8}")
    for row in rows:
        ratio = "" if row["equal"] else f"{row['direct'] / row['ours']:8.2f}"
        print(f"{row['what']:36}{row['direct']:>14.6g}{row['ours']:>14.6g}{ratio}")
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(args.json, {"flags": flags, "torch": torch.__version__, "machine": platform.machine(), "rows": rows})
    allowed = 0.05 if args.bf16 else 1e-3
    wrong = [
        row["what"] for row in rows if row["equal"] and abs(row["direct"] - row["ours"]) > allowed * abs(row["direct"])
    ]
    if wrong:
        print(f"the forms disagree in: {', '.join(wrong)}")
    return 1 if wrong else 0


def build_model(args: argparse.Namespace) -> "Retrieval":
    """A random model on the device; no dropout, because the forms draw it differently."""
    import torch

    from mra import Retrieval, load_config
    from tbps_common.datasets import read_json

    config = SMALL
    if args.full_size:
        config = load_config("configs/cuhk.yaml")
        vision, text = (read_json(PACKAGE / config[key]) for key in ("vision_config", "text_config"))
        config = {**config, "itc_dop": 0.0}
        config["vision_config"] = {**vision, "drop_rate": 0.0, "drop_path_rate": 0.0}
        config["text_config"] = {**text, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = Retrieval(config, init_backbones=False)
    # The released initialisation of the projections makes all features alike.
    for head in (model.vision_proj, model.text_proj):
        torch.nn.init.normal_(head[2].weight, std=0.02)  # type: ignore[index]
    torch.nn.init.normal_(model.itm_head[3].weight, std=0.2)  # type: ignore[arg-type]
    return model.to(args.device)


def training_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A whole step and its forward FLOPs, and the loss, of both forms on twin models."""
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mra import create_optimizer

    ours = build_model(args).train()
    direct = copy.deepcopy(ours)
    batch = random_batch(ours, args)
    negatives = {
        name: tuple(torch.randint(0, args.batch_size, (2, args.batch_size), device=args.device))
        for name in ("main", "eda")
    }
    optimizers = create_optimizer(ours, OPTIMIZER), direct_form.optimizer(direct, OPTIMIZER)
    losses: dict[str, float] = {}

    def autocast() -> torch.autocast:
        return torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)

    def our_losses() -> "Tensor":
        for _ in negatives:  # drawn as in training; the fixed ones make the losses comparable
            ours.drawn_negatives(batch["feat"], batch["feat"], batch["idx"])
        return torch.stack(ours(**{key: value for key, value in batch.items() if key != "feat"}, negatives=negatives))

    def step(name: str, forward: Callable[[], "Tensor"], optimizer: Any) -> Callable[[], None]:
        def run() -> None:
            with autocast():
                loss = forward()[:3].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.setdefault(name, loss.item())

        return run

    forwards = {"direct": lambda: direct_form.losses(direct, batch, negatives), "ours": our_losses}
    work = {}
    for name, forward in forwards.items():
        with torch.no_grad(), autocast(), FlopCounterMode(display=False) as counter:
            forward()
        work[name] = counter.get_total_flops() / args.batch_size / 1e9
    forms = {name: step(name, forwards[name], optimizers[name == "direct"]) for name in forwards}
    timed = milliseconds(forms, args)
    return [
        {"what": "training step, ms", **timed, "equal": False},
        {"what": "forward GFLOP per pair", **work, "equal": False},
        {"what": "total loss of the first step", **losses, "equal": True},
    ]


def reranking(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Embeddings to final scores to metrics; encoding itself is the same in both forms."""
    import torch

    from mra import itm_rerank, retrieval_metrics

    model = build_model(args).eval()
    settings = model.settings
    generator = torch.Generator().manual_seed(args.seed)

    def random(*shape: int) -> "Tensor":
        return torch.randn(shape, generator=generator).to(args.device)

    queries, gallery, k = args.queries, args.gallery, min(args.k, args.gallery)
    images = [random(gallery, 1 + settings.vision.num_tokens, settings.vision.feature_width) for _ in range(2)]
    ids, atts = random_texts(model, queries, generator)
    sims = random(queries, gallery)
    g_pids = torch.arange(gallery) % max(1, gallery // 3)
    q_pids = torch.randint(0, int(g_pids.max()) + 1, (queries,), generator=generator)
    found: dict[str, dict[str, Any]] = {"direct": {}, "ours": {}}
    with torch.no_grad():
        text = torch.cat(
            [
                model.get_text_embeds(*part)
                for part in zip(ids.to(args.device).split(64), atts.to(args.device).split(64))
            ]
        )

    def ours() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            scores = itm_rerank(model, sims, images[0], text, atts.to(args.device), k, images[1], score_world=4)
        found["ours"] = {"scores": scores, **retrieval_metrics(scores, g_pids, q_pids)}

    def direct() -> None:
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            scores = direct_form.scores(model, sims, images, text, atts.to(args.device), k)
        found["direct"] = {"scores": scores, "mAP": direct_form.map_percent(scores, q_pids, g_pids)}

    timed = milliseconds({"direct": direct, "ours": ours}, args)
    scores = {name: result["scores"] for name, result in found.items()}
    # One number for a matrix of scores: their projection on fixed random directions.
    direction = random(queries, gallery)
    pairs = 2 * queries * k
    return [
        {"what": "re-ranking and metrics, ms", **timed, "equal": False},
        {"what": "ms per judged pair", **{name: value / pairs for name, value in timed.items()}, "equal": False},
        {"what": "scores, summed up at random", **{name: (value * direction).sum().item() for name, value in scores.items()},
         "equal": True},
        {"what": "mAP", **{name: result["mAP"] for name, result in found.items()}, "equal": True},
    ]  # fmt: skip


def random_texts(model: "Retrieval", count: int, generator: Any) -> "tuple[Tensor, Tensor]":
    """Token ids and masks of captions of 18 to 40 tokens, the lengths of CUHK-PEDES."""
    import torch

    tokens = model.settings.max_tokens
    lengths = torch.randint(18, 41, (count, 1), generator=generator)
    atts = (torch.arange(tokens) < lengths).long()
    return torch.randint(5, model.settings.text.vocab_size, (count, tokens), generator=generator) * atts, atts


def random_batch(model: "Retrieval", args: argparse.Namespace) -> dict[str, "Tensor"]:
    """A training batch of the cuhk configuration; `feat` are features to draw negatives from."""
    import torch

    generator = torch.Generator().manual_seed(args.seed)
    count, vision = args.batch_size, model.settings.vision
    batch = {"image": torch.randn(count, 3, vision.height, vision.width, generator=generator)}
    batch["text_ids"], batch["text_atts"] = random_texts(model, count, generator)
    batch["text_ids_eda"], batch["text_atts_eda"] = random_texts(model, count, generator)
    batch["masked_pos"] = (
        torch.rand(count, model.settings.max_tokens - 1, generator=generator).argsort(dim=1)[:, :MASKED] + 1
    )
    batch["masked_ids"] = batch["text_ids"].gather(1, batch["masked_pos"])
    batch["text_ids_masked"] = batch["text_ids"].scatter(1, batch["masked_pos"], 4)
    batch["idx"] = torch.arange(count)
    batch["feat"] = torch.randn(count, model.settings.embed_dim, generator=generator)
    return {name: value.to(args.device) for name, value in batch.items()}


def milliseconds(forms: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, float]:
    """Of the fastest run of each form."""
    return {name: cost.milliseconds for name, cost in measure(forms, repeats=args.repeats, device=args.device).items()}


if __name__ == "__main__":
    sys.exit(main())
