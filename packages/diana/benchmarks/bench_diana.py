"""Attribute similarity, a training step, and a sweep over dialogue lengths, each against the direct form.

The direct form broadcasts the attributes of all pairs (`N x M x K x C`), pads every dialogue to the limit, hands Llama a
mask that causal attention makes superfluous, and encodes a dialogue again for every number of rounds. Both forms run in
one process, taking turns, on the same weights and data, and the fastest of the repeats counts; their results are compared
first, because a saving that changes them is none. Times on the CPU are CPU times, which other programs on the machine
hardly disturb; on a GPU they are wall times.

    python packages/diana/benchmarks/bench_diana.py                               # toy sizes, any machine
    python packages/diana/benchmarks/bench_diana.py --full-size --device cuda     # Llama-3.2-1B and SwinV2-B, bfloat16
"""

import argparse
import platform
import random
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tbps_common.bench.timer import Cost, difference, measure
from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_common.run.command import command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diana.model import DiaNAConfig, DiaNAModel

WORDS = "man woman red blue black grey coat jeans skirt bag shoes hair long short white hat walking carrying".split()
TURNS = 5
FULL_VOCABULARY = 128_256

TINY: dict[str, Any] = {
    "vision_config": {
        "embed_dim": 16,
        "depths": [1, 2, 1, 1],
        "num_heads": [2, 2, 4, 4],
        "window_size": 4,
        "image_size": [96, 48],
        "drop_path_rate": 0.0,
    },
    "llama_config": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "refiner_config": {"enable_refiner": True, "enable_sdm": True, "num_query": 16, "sim_type": "avg"},
    "embed_dim": 128,
    "enable_sdm": True,
}
FULL: dict[str, Any] = {
    "vision_config": {
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
        "window_size": 12,
        "image_size": [384, 192],
        "drop_path_rate": 0.0,
    },
    "llama_config": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "vocab_size": FULL_VOCABULARY,
    },
    "refiner_config": {"enable_refiner": True, "enable_sdm": True, "num_query": 16, "sim_type": "avg"},
    "embed_dim": 768,
    "enable_sdm": True,
}


def build_parser() -> argparse.ArgumentParser:
    """The flags of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python packages/diana/benchmarks/bench_diana.py",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--full-size", action="store_true", help="Llama-3.2-1B and SwinV2-B sizes, random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--batch_size", type=whole_number(2), default=8, help="pairs per training step, and dialogues")
    parser.add_argument("--max_seq_length", type=whole_number(8), default=400, help="the direct form pads to this")
    parser.add_argument("--gallery", type=whole_number(1), default=100, help="columns of the attribute similarity")
    parser.add_argument("--repeats", type=whole_number(1), default=3, help="timed repeats of each form")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="CPU threads")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of weights and data")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table."""
    args = build_parser().parse_args(argv)
    import torch

    from tbps_common.files import write_json
    from tbps_common.run.device import choose_device

    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = [*similarity(args, device), *model_rows(args, device)]
    what = "Llama-3.2-1B and SwinV2-B sizes, bfloat16" if args.full_size else "toy sizes, float32"
    print(f"{what}, batch {args.batch_size}, {args.threads} threads, {device}, torch {torch.__version__}")
    print(f"{'':46}{'direct form':>13}{'this package':>14}{'ratio':>8}")
    for row in rows:
        print(f"{row['what']:46}{row['direct']:>13.5g}{row['ours']:>14.5g}{row['direct'] / row['ours']:>8.2f}")
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(args.json, {"flags": flags, "torch": torch.__version__, "machine": platform.machine(), "rows": rows})
    return 0


def similarity(args: argparse.Namespace, device: "torch.device") -> list[dict[str, Any]]:
    """Attribute similarity of a batch with a gallery, every reduction, at the paper's K = 16 and C = 768."""
    import torch

    from diana.similarity import SIM_TYPES, attribute_similarity

    generator = torch.Generator().manual_seed(args.seed)
    a, b = (torch.randn(n, 16, 768, generator=generator).to(device) for n in (args.batch_size, args.gallery))
    rows = []
    for sim_type in SIM_TYPES:
        check_equal(attribute_similarity(a, b, sim_type), broadcast_similarity(a, b, sim_type), 1e-5, sim_type)

        def ours(sim_type: str = sim_type) -> None:
            attribute_similarity(a, b, sim_type)

        def direct(sim_type: str = sim_type) -> None:
            broadcast_similarity(a, b, sim_type)

        costs = measure({"direct": direct, "ours": ours}, repeats=args.repeats, device=device)
        rows.append({"what": f"attribute similarity {sim_type}, ms", **milliseconds(costs)})
    return rows


def model_rows(args: argparse.Namespace, device: "torch.device") -> list[dict[str, Any]]:
    """A training step, and the encoding of dialogues for every number of rounds."""
    import torch

    from diana.model import DiaNAModel

    # Rounded weights are the price of half precision; both forms pay it, so they are compared loosely there.
    tolerance = 3e-2 if args.full_size else 1e-3
    texts = [token_rows(random.Random(args.seed + number), args.max_seq_length) for number in range(args.batch_size)]
    model = DiaNAModel(bench_config(args.full_size))
    model.to(device, torch.bfloat16 if args.full_size else torch.float32)
    batch = training_batch(args, model.config, texts)
    rows = []
    for attention in attention_kernels(model):
        model.set_attention(attention)
        rows += training_step(args, model, batch, tolerance, attention)
        rows += sweep(args, model, texts, tolerance, attention)
    return rows


def attention_kernels(model: "DiaNAModel") -> list[str]:
    """The kernels this machine has for the dialogue tower."""
    from importlib.util import find_spec

    import torch

    half_on_gpu = model.device.type == "cuda" and model.dtype == torch.bfloat16
    return ["sdpa", *(["flash_attention_2"] if half_on_gpu and find_spec("flash_attn") is not None else [])]


def training_step(
    args: argparse.Namespace, model: "DiaNAModel", batch: dict[str, "Tensor"], tolerance: float, attention: str
) -> list[dict[str, Any]]:
    """Forward and backward pass on padded and on cut dialogues."""
    import torch

    from diana.data import Collate

    items = [dict(zip(batch, values)) for values in zip(*batch.values())]
    cut = {name: value.to(model.device) for name, value in Collate(0)(items).items()}
    padded = {name: value.to(model.device) for name, value in batch.items()}
    losses = {"direct": direct_forward(model, padded).item(), "ours": model(**cut).loss.item()}
    check_equal(torch.tensor(losses["ours"]), torch.tensor(losses["direct"]), tolerance * losses["direct"], "the loss")

    def step(loss: Callable[[], "Tensor"]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            loss().backward()

        return run

    forms = {"direct": step(lambda: direct_forward(model, padded)), "ours": step(lambda: model(**cut).loss)}
    costs = measure(forms, repeats=args.repeats, device=model.device)
    peaks = {name: cost.peak_mib for name, cost in costs.items()}
    model.zero_grad(set_to_none=True)
    rows = [
        {"what": f"training step ({attention}), ms", **milliseconds(costs)},
        {"what": f"loss of the step ({attention})", **losses},
        {"what": "tokens of the batch", "direct": batch["input_ids"].numel(), "ours": cut["input_ids"].numel()},
    ]
    if model.device.type == "cuda":
        rows.append({"what": f"peak memory of the step ({attention}), MiB", **peaks})
    return rows


def sweep(
    args: argparse.Namespace, model: "DiaNAModel", texts: list[list[list[int]]], tolerance: float, attention: str
) -> list[dict[str, Any]]:
    """Features of every dialogue after 1 to 5 rounds: each length by itself, and all in one pass."""
    import torch

    from diana.retrieval import encode_turns

    tokenizer = _Ids()
    versions = [[" ".join(map(str, row)) for row in rows] for rows in texts]
    options: dict[str, Any] = {"max_seq_length": args.max_seq_length, "batch_size": args.batch_size, "attributes": True}
    length = args.max_seq_length

    def ours() -> list[tuple["Tensor", "Tensor | None"]]:
        return encode_turns(model, tokenizer, versions, **options)  # type: ignore[arg-type]

    @torch.inference_mode()
    def direct() -> list[tuple["Tensor", "Tensor"]]:
        results = []
        for turn in range(TURNS):
            ids, mask = padded_ids([rows[turn] for rows in texts], length)
            embeds, dense = model.encode_text(ids, mask)
            attributes = model.refine(dense, mask)
            results.append(tuple(torch.nn.functional.normalize(x.float(), dim=-1).cpu() for x in (embeds, attributes)))
        return results

    for one, other in zip(ours(), direct()):
        for found, expected in zip(one, other):
            assert found is not None
            check_equal(found, expected, tolerance, "the features of the sweep")
    costs = measure({"direct": direct, "ours": ours}, repeats=args.repeats, device=model.device)
    return [{"what": f"dialogues after 1 to {TURNS} rounds ({attention}), ms", **milliseconds(costs)}]


class _Ids:
    """Stands for a tokenizer where texts are made of token ids anyway."""

    pad_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(token) for token in text.split()] for text in texts]}


def bench_config(full_size: bool) -> "DiaNAConfig":
    """Sizes of the benchmark's model."""
    from diana.model import DiaNAConfig

    settings = FULL if full_size else {**TINY, "llama_config": {**TINY["llama_config"], "vocab_size": 600}}
    return DiaNAConfig(**settings)


def token_rows(rng: random.Random, limit: int) -> list[list[int]]:
    """Token ids of one dialogue after 1 to 5 rounds; as in ChatPedes texts, the end of a round differs when cut."""
    trunk = list(range(10, 58))  # the system text, the same everywhere
    rows = []
    for _ in range(TURNS):
        trunk += [rng.randrange(100, 500) for _ in range(rng.randint(24, 60))]
        rows.append([*trunk[: limit - 1], 60])
        trunk.append(61)
    return rows


def padded_ids(rows: list[list[int]], length: int) -> tuple["Tensor", "Tensor"]:
    """`[B, length]` ids and mask."""
    import torch

    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids, (ids != 0).long()


def training_batch(
    args: argparse.Namespace, config: "DiaNAConfig", texts: list[list[list[int]]]
) -> dict[str, "Tensor"]:
    """Random images, and dialogues cut after a random number of rounds, as in training."""
    import torch

    rng = random.Random(args.seed)
    ids, mask = padded_ids([rng.choice(rows) for rows in texts], args.max_seq_length)
    return {
        "pixel_values": torch.randn(args.batch_size, 3, *config.image_size),
        "input_ids": ids,
        "attention_mask": mask,
        "image_ids": torch.arange(args.batch_size)[:, None],
    }


def direct_forward(model: "DiaNAModel", batch: dict[str, "Tensor"]) -> "Tensor":
    """The training loss as the method describes it: padded texts, masked attention, broadcast attributes."""
    import torch
    import torch.nn.functional as F

    from diana.losses import build_targets, compute_itc, compute_sdm

    image, image_tokens = model.encode_image(batch["pixel_values"])
    text, text_tokens = model.encode_text(batch["input_ids"], batch["attention_mask"])
    a = model.refine(image_tokens).float()
    b = model.refine(text_tokens, batch["attention_mask"]).float()
    scale = model.logit_scale.float().exp()
    image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
    targets = build_targets(batch["image_ids"].reshape(-1))
    loss = torch.zeros((), device=image.device)
    for sim in (text @ image.t(), image @ text.t(), broadcast_similarity(b, a), broadcast_similarity(a, b)):
        loss = loss + (compute_itc(scale * sim, targets) + compute_sdm(scale * sim, targets)) / 2
    return loss


def broadcast_similarity(a: "Tensor", b: "Tensor", sim_type: str = "avg") -> "Tensor":
    """The definition, over an `N x M x K x C` tensor."""
    import torch.nn.functional as F

    cosines = F.cosine_similarity(a[:, None], b[None], dim=-1, eps=1e-8)  # (N, M, K)
    if sim_type == "avg":
        return cosines.mean(-1)
    if sim_type in ("max", "min"):
        return cosines.amax(-1) if sim_type == "max" else cosines.amin(-1)
    return cosines.logsumexp(-1) if sim_type == "lsp_max" else -(-cosines).logsumexp(-1)


def milliseconds(costs: Mapping[str, Cost]) -> dict[str, float]:
    """Columns of a row."""
    return {name: cost.milliseconds for name, cost in costs.items()}


def check_equal(found: "Tensor", expected: "Tensor", tolerance: float, what: str) -> None:
    """Stop the benchmark if the two forms disagree.

    Raises:
        RuntimeError: they differ by more than the tolerance.
    """
    apart = difference(found, expected)
    if not apart <= tolerance:
        raise RuntimeError(f"The two forms of {what} differ by {apart:.3g}, more than {tolerance:.3g}.")


if __name__ == "__main__":
    sys.exit(main())
