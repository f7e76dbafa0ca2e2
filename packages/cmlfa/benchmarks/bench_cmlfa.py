"""`python packages/cmlfa/benchmarks/bench_cmlfa.py`: a training step and an evaluation, this package against the direct form of the method.

The direct form encodes the text once per branch, computes the MLM logits of every position, keeps one optimizer group
per parameter, rebuilds the list of replacement tokens for every masked caption, tokenises the captions anew for every
evaluation, and sorts whole score matrices. Both forms run interleaved in one process on the same weights and data; the
fastest of the repeats counts. Times on the CPU are CPU times, which other programs on the machine hardly disturb; on a
GPU they are wall times. The losses of both are printed, because a saving that changes them is none.
"""

import argparse
import platform
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cmlfa.datasets import TextDataset, mask_tokens, tokenize
from cmlfa.datasets.tokenizer import shared_tokenizer
from cmlfa.model import CMLFA, ClipGeometry, ModelSettings
from cmlfa.model.cmlfa import resolve_precision, to_released_half
from cmlfa.objectives import compute_id, compute_itc, compute_mlm, compute_sdm
from cmlfa.options import get_args
from cmlfa.solver import ADAM_EPSILON, build_optimizer, parameter_rule
from tbps_common.bench.timer import measure
from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.ranking import retrieve
from tbps_common.run.command import command

# Sizes of the CLIP towers, image and text; "paper" is ViT-B/16 on 384 x 128 images.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "clip": {
            "embed_dim": 128,
            "vision_width": 128,
            "vision_layers": 3,
            "patch_size": 16,
            "text_width": 128,
            "text_layers": 3,
        },
        "img_size": (128, 64),
        "text_length": 48,
        "classes": 400,
        "queries": 800,
        "gallery": 400,
    },
    "paper": {
        "clip": {
            "embed_dim": 512,
            "vision_width": 768,
            "vision_layers": 12,
            "patch_size": 16,
            "text_width": 512,
            "text_layers": 12,
        },
        "img_size": (384, 128),
        "text_length": 77,
        "classes": 11003,
        "queries": 6156,
        "gallery": 3074,
    },
}
VOCABULARY = 49408
WORDS = (
    "a man woman with red blue black grey coat jeans skirt backpack shoes walking hair long short and white bag".split()
)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python packages/cmlfa/benchmarks/bench_cmlfa.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="sizes of model and data")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs per training step")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each form; the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the training step runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table."""
    args = build_parser().parse_args(argv)
    for flag in ("batch_size", "repeats", "threads"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} must be at least 1, but it is {getattr(args, flag)}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was given, but torch finds no GPU: use --device cpu.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = [*training_step(args), *host_side(args), *evaluation(args)]
    print(f"{args.size}, batch {args.batch_size}, {args.threads} threads, {args.device}, torch {torch.__version__}")
    print(f"{'':34}{'direct form':>14}{'this package':>14}{'ratio':>8}")
    for row in rows:
        print(f"{row['what']:34}{row['direct']:>14.4g}{row['ours']:>14.4g}{row['direct'] / row['ours']:>8.2f}")
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(args.json, {"flags": flags, "torch": torch.__version__, "machine": platform.machine(), "rows": rows})
    return 0


def training_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole step, its forward FLOPs, and the loss, of both forms on twin models."""
    size = SIZES[args.size]
    settings = ModelSettings(img_size=size["img_size"], text_length=size["text_length"], loss_names="sdm+mlm+id+itc")
    geometry = ClipGeometry(context_length=size["text_length"], vocab_size=VOCABULARY, **size["clip"])
    # Dropout draws would differ between the forms, so both run without it.
    ours, direct = (CMLFA(settings, geometry, size["classes"]).eval() for _ in range(2))
    direct.load_state_dict(ours.state_dict())
    for model in (ours, direct):
        if resolve_precision("auto", args.device) == "fp16":
            to_released_half(model)
        model.to(args.device)
    batch = {name: tensor.to(args.device) for name, tensor in random_batch(args).items()}
    flags = get_args([])
    optimizers = build_optimizer(flags, ours), direct_optimizer(flags, direct)
    losses: dict[str, float] = {}

    def step(name: str, model: CMLFA, forward: Callable[..., Any], optimizer: Any) -> Callable[[], None]:
        def run() -> None:
            entries = forward(model, batch)
            loss = torch.stack([value for key, value in entries.items() if "loss" in key]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.setdefault(name, loss.item())

        return run

    forms = {
        "direct": step("direct", direct, direct_forward, optimizers[1]),
        "ours": step("ours", ours, CMLFA.__call__, optimizers[0]),
    }
    work = {}
    for name, model, forward in (("direct", direct, direct_forward), ("ours", ours, CMLFA.__call__)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward(model, batch)
        work[name] = counter.get_total_flops() / args.batch_size / 1e9
    timed = milliseconds(forms, args.repeats, args.device)
    return [
        {"what": "training step, ms", **timed},
        {"what": "forward GFLOP per pair", **work},
        {"what": "total loss of the first step", **losses},
        {
            "what": "optimizer groups",
            "direct": len(optimizers[1].param_groups),
            "ours": len(optimizers[0].param_groups),
        },
    ]


def host_side(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Masking of one caption."""
    ids = tokenize(random_caption(random.Random(args.seed)), shared_tokenizer())
    count = 20

    def many(mask: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: [mask(ids) for _ in range(count)]

    timed = milliseconds({"direct": many(direct_masking), "ours": many(mask_tokens)}, args.repeats)
    return [{"what": "masking of a caption, ms", **{name: value / count for name, value in timed.items()}}]


def evaluation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Query captions to token ids, and features to metrics; encoding itself is the same in both forms."""
    size = SIZES[args.size]
    queries, gallery = size["queries"], size["gallery"]
    rng = random.Random(args.seed)
    captions = [random_caption(rng) for _ in range(queries)]
    texts = TextDataset([0] * queries, captions, size["text_length"])
    timed_ids = milliseconds(
        {
            "direct": lambda: [tokenize(caption, shared_tokenizer(), size["text_length"]) for caption in captions],
            "ours": lambda: [texts[index] for index in range(queries)],
        },
        args.repeats,
    )
    generator = torch.Generator().manual_seed(args.seed)
    persons = max(gallery // 3, 1)
    g_pids = torch.arange(gallery) % persons
    q_pids = torch.randint(0, persons, (queries,), generator=generator)
    features = torch.nn.functional.normalize(torch.randn(queries + gallery, 512, generator=generator), dim=1)
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = retrieve(features[:queries], features[queries:], q_pids, g_pids).metrics["mAP"]

    def direct() -> None:
        found["direct"] = direct_metrics(features[:queries] @ features[queries:].t(), q_pids, g_pids)

    timed_metrics = milliseconds({"direct": direct, "ours": ours}, args.repeats)
    return [
        {"what": "token ids of all queries, ms", **timed_ids},
        {"what": "metrics of an evaluation, ms", **timed_metrics},
        {"what": "mAP", **found},
    ]


def direct_forward(model: CMLFA, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses as the method describes them: each branch encodes its text, and every position is scored."""
    vision, ids = model.image_tokens(batch["images"]), batch["caption_ids"]
    text = model.text_tokens(ids)
    image_feature = model.latent(vision[:, 1:]).mean(dim=1) + vision[:, 0].float()
    end = text[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)].float()
    text_feature = model.latent(text).mean(dim=1) + end
    dtype = model.classifier.weight.dtype
    image_logits, text_logits = (model.classifier(x.to(dtype)).float() for x in (image_feature, text_feature))
    scores = model.mlm_head(model.cross_former(model.text_tokens(batch["mlm_ids"]), vision, vision)).float()
    weights = model.settings
    return {
        "itc_loss": weights.itc_loss_weight * compute_itc(image_feature, text_feature, model.logit_scale),
        "sdm_loss": compute_sdm(image_feature, text_feature, batch["pids"], model.logit_scale),
        "id_loss": weights.id_loss_weight * compute_id(image_logits, text_logits, batch["pids"]),
        "mlm_loss": weights.mlm_loss_weight * compute_mlm(scores, batch["mlm_labels"]),
    }


def direct_optimizer(args: Any, model: CMLFA) -> torch.optim.Optimizer:
    """Adam with one group per parameter."""
    groups = []
    for name, parameter in model.named_parameters():
        lr, weight_decay = parameter_rule(name, args)
        groups.append({"params": [parameter], "lr": lr, "weight_decay": weight_decay})
    return torch.optim.Adam(groups, lr=args.lr, betas=(args.alpha, args.beta), eps=ADAM_EPSILON)


def direct_masking(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Masking with the list of all replacement tokens built for the caption, element by element."""
    tokens = ids.numpy().copy()
    replacements = [token for token in range(1, VOCABULARY) if token not in (0, 49405, 49406, 49407)]
    labels = []
    for position, token in enumerate(tokens):
        label = 0
        if 0 < token < 49405:
            draw = random.random()
            if draw < 0.15:
                draw /= 0.15
                label = int(token)
                if draw < 0.8:
                    tokens[position] = 49405
                elif draw < 0.9:
                    tokens[position] = random.choice(replacements)
        labels.append(label)
    if not any(labels):
        labels[1] = int(tokens[1])
        tokens[1] = 49405
    return torch.from_numpy(tokens), torch.tensor(labels)


def direct_metrics(similarity: Tensor, q_pids: Tensor, g_pids: Tensor) -> float:
    """mAP in percent by a full sort and Q x G matrices, with mINP query by query."""
    order = torch.argsort(similarity, dim=1, descending=True)
    matches = g_pids[order].eq(q_pids.view(-1, 1))
    hits = matches.cumsum(1)
    _ = [float(row[-1] / (match.nonzero()[-1] + 1)) for match, row in zip(matches, hits)]
    precision = hits / torch.arange(1, similarity.shape[1] + 1)
    return 100 * ((precision * matches).sum(1) / hits[:, -1]).mean().item()


def random_batch(args: argparse.Namespace) -> dict[str, Tensor]:
    """Random images, and captions whose words are masked as in training."""
    size = SIZES[args.size]
    rng = random.Random(args.seed)
    captions = [tokenize(random_caption(rng), shared_tokenizer(), size["text_length"]) for _ in range(args.batch_size)]
    masked = [mask_tokens(ids, rng) for ids in captions]
    mlm_ids = torch.stack([ids for ids, _ in masked])
    return {
        "pids": torch.arange(args.batch_size) % size["classes"],
        "images": torch.randn(args.batch_size, 3, *size["img_size"]),
        "caption_ids": mlm_ids,
        "mlm_ids": mlm_ids.clone(),
        "mlm_labels": torch.stack([labels for _, labels in masked]),
    }


def random_caption(rng: random.Random) -> str:
    """About 25 words, the length of a CUHK-PEDES caption."""
    return " ".join(rng.choices(WORDS, k=rng.randint(18, 32)))


def milliseconds(forms: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Of the fastest of `repeats` runs of each form."""
    return {name: cost.milliseconds for name, cost in measure(forms, repeats=repeats, device=device).items()}


if __name__ == "__main__":
    sys.exit(main())
