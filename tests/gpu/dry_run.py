"""Dry runs of the five systems at the sizes of their papers on a GPU that is not there:  `python tests/gpu/dry_run.py`.

The networks are built on the meta device and moved to the fake GPU of `fake_cuda`. Batches are real, on the CPU, and take
the way of the commands' batches: collated, moved without blocking, then the functions that `train.py` and the evaluations
call. Printed is a Markdown table: peak memory, weights, operations, waits for the device.
"""

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fake_cuda import DEVICE, fake_cuda, on_device
from torch import Tensor, nn

from cmlfa.datasets import mask_tokens, prepare_batch
from cmlfa.datasets.loaders import collate
from cmlfa.metrics import Evaluator
from cmlfa.model import CMLFA, ClipGeometry, ModelSettings
from cmlfa.model.cmlfa import to_released_half
from cmlfa.options import get_args
from cmlfa.solver import build_optimizer
from cmlfa.train import training_step as cmlfa_step
from cmlfa.train import update_meters
from fafa.data import collate_fn as collate_triplets
from fafa.evaluation import retrieval
from fafa.features import Extractor
from fafa.model import Blip2FAFACPR
from fafa.model.settings import read_settings
from fafa.optim import build_optimizer as build_fafa_optimizer
from fafa.optim import build_scheduler
from fafa.processors import BlipCaptionProcessor
from fafa.train import training_step as fafa_step
from mra import Retrieval, create_optimizer, load_config
from mra.data.loader import TrainingItems
from mra.data.loader import collate as collate_mra
from mra.model.settings import PACKAGE
from mra.optimizer import Schedule
from mra.retrieval.encode import encode_images, encode_texts
from mra.retrieval.rerank import Matcher, match_logits
from mra.text.tokens import build_tokenizer
from mra.train import to_device as mra_to_device
from mra.train import training_step as mra_step
from tbps_common.datasets import read_json
from tbps_common.run.meters import Meters
from tbps_common.run.precision import StepPrecision
from tbps_common.run.stop import FiniteLoss

Run = Callable[[], Any]


@dataclass(frozen=True)
class System:
    """A system and the phases of it that are dry-run.

    Attributes:
        build: the network on the meta device: as deep as its paper's, or (False) with few layers of the same width.
        phases: name of a phase -> what makes its run for the network on the GPU; a run can be repeated.
    """

    build: Callable[[bool], nn.Module]
    phases: dict[str, Callable[[Any], Run]]


@dataclass(frozen=True)
class Cost:
    """What a phase took.

    Attributes:
        peak: GiB of the device at most, weights and optimizer included.
        weights: GiB of parameters and buffers.
        tflop: operations of matrix products, convolutions and attention, backward pass included.
        half_share: share of them in half precision.
        waits: "what, at which lines" -> how often the host waited for the device.
    """

    peak: float
    weights: float
    tflop: float
    half_share: float
    waits: dict[str, int]


def measure(system: System, full: bool = True) -> dict[str, Cost]:
    """Phase -> its cost, on a network of its own. The second run counts, because the first one makes what stays."""
    network = system.build(full)
    costs = {}
    for name, start in system.phases.items():
        with fake_cuda() as device:
            placed = on_device(copy.deepcopy(network))
            weights = device.live
            run = start(placed)
            run()
            device.start()
            run()
            tflop = sum(device.flops.values()) / 1e12
            costs[name] = Cost(device.peak / 2**30, weights / 2**30, tflop, device.half_share, dict(device.waits))
            del placed, run
    return costs


def token_ids(rows: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(1, vocabulary, (rows, length))


@contextmanager
def bert_vocabulary() -> Iterator[str]:
    """Folder of a vocabulary as large as BERT's, whose words are numbers."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(30517))]
        Path(folder, "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        yield folder


# CMLFA: ViT-B/16 on 384 x 128 in the released mixture of float16 and float32.


def build_cmlfa(full: bool) -> nn.Module:
    settings, depth = ModelSettings(loss_names="sdm+mlm+id+itc"), 12 if full else 2
    with torch.device("meta"):
        model = CMLFA(settings, ClipGeometry(512, 768, depth, 16, 77, 49408, 512, depth), 11003)
    to_released_half(model)
    return model


def train_cmlfa(model: CMLFA) -> Run:
    optimizer, precision = build_optimizer(get_args([]), model), StepPrecision("fp32", DEVICE)
    meters, finite = Meters(), FiniteLoss(DEVICE, str)

    def run() -> None:
        items = []
        for number in range(64):
            ids, labels = mask_tokens(token_ids(1, 77, 49405)[0])
            image = torch.empty(3, 384, 128)
            items.append({"pids": number, "images": image, "caption_ids": ids, "mlm_ids": ids, "mlm_labels": labels})
        outputs = cmlfa_step(model, prepare_batch(collate(items), DEVICE), optimizer, precision)
        finite.update(outputs["loss"], 1)
        update_meters(meters, outputs, 64)

    return run


def encode_cmlfa(model: CMLFA) -> Run:
    pids = torch.arange(512)
    images, texts = [(pids, torch.empty(512, 3, 384, 128))] * 2, [(pids, token_ids(512, 77, 49408))] * 2
    return lambda: Evaluator(images, texts).compute_embedding(model)


# FAFA: EVA ViT-g on 224 x 224 in float16, frozen; the Q-Former under autocast.


def build_fafa(full: bool) -> nn.Module:
    paper = read_settings("pretrain", load_pretrained=False)
    if not full:
        paper = replace(paper, vit_depth=2, qformer=replace(paper.qformer, num_hidden_layers=2))
    with bert_vocabulary() as folder, torch.device("meta"):
        model = Blip2FAFACPR(replace(paper, tokenizer=folder))
    model.store_vit_in_half()
    return model.train()


def train_fafa(model: Blip2FAFACPR) -> Run:
    optimizer, precision = build_fafa_optimizer(model, 2e-6), StepPrecision("fp16", DEVICE)
    scheduler = build_scheduler(optimizer, 2e-6, 4492, 10)
    weights = {"loss_fda": 1.0, "loss_fd": 1.0, "loss_mfr": 0.5}
    meters, finite, clean = Meters(), FiniteLoss(DEVICE, str), BlipCaptionProcessor()
    size = model.settings.image_size

    def run() -> None:
        items = [
            (torch.empty(3, size, size), torch.empty(3, size, size), "1 2 3 " * 6, number) for number in range(256)
        ]
        images, targets, captions, groups = collate_triplets(items)
        samples = {
            "image": images.to(DEVICE, non_blocking=True),
            "target": targets.to(DEVICE, non_blocking=True),
            "text_input": [clean(caption) for caption in captions],
            "query_id": groups.to(DEVICE, non_blocking=True),
        }
        losses = fafa_step(model, samples, weights, optimizer, precision)
        scheduler.step()
        finite.update(losses.pop("total"), 1)
        meters.update(losses, 256)

    return run


def encode_fafa(model: Blip2FAFACPR) -> Run:
    size = model.settings.image_size
    images = [(number, torch.empty(3, size, size)) for number in range(128)]
    extractor = Extractor(model, BlipCaptionProcessor(), num_workers=0)

    def run() -> None:
        extractor.gallery(images)
        extractor.queries(images, ["1 2 3 " * 6] * len(images))

    return run


def rank_fafa(model: Blip2FAFACPR) -> Run:
    ids = torch.arange(256), torch.arange(256).repeat(16)
    queries, gallery = torch.empty(256, 256, device=DEVICE), torch.empty(4096, 32, 256, device=DEVICE)
    return lambda: retrieval(queries, gallery, *ids, k=6, row_budget=1 << 30)


# MRA: Swin-B and BERT under bfloat16 autocast; pre-training on SDA, fine-tuning on CUHK-PEDES, its evaluation.


def build_mra(task: str) -> Callable[[bool], nn.Module]:
    def build(full: bool) -> nn.Module:
        config = load_config(f"configs/{task}.yaml")
        for key, few in (
            ("vision_config", {"depths": [1, 1, 1, 1]}),
            ("text_config", {"num_hidden_layers": 4, "fusion_layer": 2}),
        ):
            config[key] = {**read_json(PACKAGE / config[key]), **({} if full else few)}
        config["lr_2"] &= full  # it names layers
        with torch.device("meta"):
            return Retrieval(config, init_backbones=False)

    return build


def train_mra(task: str) -> Callable[[Retrieval], Run]:
    def start(model: Retrieval) -> Run:
        config = load_config(f"configs/{task}.yaml")
        optimizer, precision = create_optimizer(model, config["optimizer"]), StepPrecision("bf16", DEVICE)
        schedule = Schedule(optimizer, config["schedular"], 1000)
        meters, finite, weight = Meters(), FiniteLoss(DEVICE, str), config["region"]
        image, atts = torch.empty(3, config["h"], config["w"]), torch.ones(1 + model.settings.vision.num_tokens)
        caption = "1 2 3 " * 8
        pairs: Any = [(image, caption, caption, atts, "4 5 6", number, number) for number in range(40)]
        with bert_vocabulary() as folder:
            items = TrainingItems(pairs, build_tokenizer(folder), config)

        def run() -> None:
            batch = mra_to_device(collate_mra([items[number] for number in range(40)]), DEVICE)
            losses, _ = mra_step(model, batch, weight, optimizer, precision)
            schedule.set_rates(1)
            meters.update(losses)
            finite.update(losses["loss"], 1)

        return run

    return start


def judge_mra(model: Retrieval) -> Run:
    model.eval()
    images = torch.empty(80, 3, model.settings.vision.height, model.settings.vision.width)
    ids, atts = token_ids(200, 56, 30522), (torch.arange(56) < torch.randint(12, 56, (200, 1))).long()
    candidates = torch.stack([torch.randperm(80)[:64] for _ in range(200)])

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):  # --amp_eval
            tokens, _ = encode_images(model, images.to(DEVICE, non_blocking=True))
            texts, _ = encode_texts(model, ids.to(DEVICE, non_blocking=True), atts.to(DEVICE, non_blocking=True))
            match_logits(Matcher(model, texts, atts), candidates, tokens)

    return run


SYSTEMS = {
    "cmlfa": System(build_cmlfa, {"training step, 64 pairs": train_cmlfa, "encoding, 512 pairs": encode_cmlfa}),
    "fafa": System(
        build_fafa,
        {
            "training step, 256 triplets": train_fafa,
            "encoding, 64 at once": encode_fafa,
            "ranking, 256 queries, 4096 pictures": rank_fafa,
        },
    ),
    "mra sda": System(build_mra("sda"), {"training step, 40 pairs": train_mra("sda")}),
    "mra cuhk": System(
        build_mra("cuhk"),
        {
            "training step, 40 pairs": train_mra("cuhk"),
            "encoders and judge, 200 captions x 64 of 80 pictures": judge_mra,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SYSTEMS)}; all by default")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*pin_memory.*")
    print("| | peak GiB | weights GiB | TFLOP | in half precision | waits |\n| --- | --- | --- | --- | --- | --- |")
    for name in args.names or SYSTEMS:
        for phase, cost in measure(SYSTEMS[name]).items():
            numbers = f"{cost.peak:.1f} | {cost.weights:.2f} | {cost.tflop:.1f} | {cost.half_share:.1%}"
            print(f"| {name}: {phase} | {numbers} | {sum(cost.waits.values())} |", flush=True)
            for wait, count in cost.waits.items():
                print(f"  {count} x {wait}", file=sys.stderr)


if __name__ == "__main__":
    main()
