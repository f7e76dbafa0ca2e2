"""The five systems at the sizes of their papers, with random weights: their networks, and the steps that their commands make.

Batches are made on the CPU and take the way of the commands' batches: collated, moved without blocking, then the functions
that `train.py` and the evaluations call. `dry_run` runs them on a GPU that is not there, `run` on one that is.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    TrainerCallback,
    TrainingArguments,
)

from cmlfa.datasets import mask_tokens, prepare_batch
from cmlfa.datasets.loaders import collate
from cmlfa.metrics import Evaluator
from cmlfa.model import CMLFA, ClipGeometry, ModelSettings
from cmlfa.model.cmlfa import to_released_half
from cmlfa.options import get_args
from cmlfa.solver import build_optimizer
from cmlfa.train import training_step as cmlfa_step
from cmlfa.train import update_meters
from diana.model import DiaNAModel
from diana.model.config import DiaNAConfig
from diana.options import TrainOptions
from diana.retrieval.features import evaluating, finished
from diana.train import TRAINER_DEFAULTS, DianaTrainer
from diana.trainer_flags import read_trainer_flags
from dp_gen.data.dataset import collate_fn as collate_dp
from dp_gen.generation.sampling import decode_latents, denoise
from dp_gen.model.diverse_person import DiversePersonModel
from dp_gen.optim import build_optimizer as build_dp_optimizer
from dp_gen.optim import set_trainable
from dp_gen.options import parse_args
from dp_gen.tracking import LossHistory
from dp_gen.train import update as dp_update
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

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[[], Any]
Size = Literal["paper", "few layers", "tiny"]


@dataclass(frozen=True)
class Place:
    """Where and how much a phase computes.

    Attributes:
        device: of the network.
        count: items at a time.
        begin: called where a run that has a loop of its own begins the step that counts.
    """

    device: torch.device
    count: int
    begin: Callable[[], None]


@dataclass(frozen=True)
class Phase:
    """What is done with a network.

    Attributes:
        start: network and place -> its run, which can be repeated.
        count: items at a time in the paper.
        items: what they are.
    """

    start: Callable[[Any, Place], Run]
    count: int
    items: str


@dataclass(frozen=True)
class System:
    """A system and its phases.

    Attributes:
        build: size and device -> the network: that of the paper; one with few layers of the same width; or a tiny one.
        phases: by name.
    """

    build: Callable[[Size, str], nn.Module]
    phases: dict[str, Phase]


def pictures(count: int, height: int, width: int) -> Tensor:
    """Of one colour, because numbers do not matter and random ones take longer than a dry run."""
    return torch.full((count, 3, height, width), 0.5)


@contextmanager
def accelerate_on(device: torch.device) -> Iterator[None]:
    """Context in which accelerate computes there, also where it would not find it."""
    AcceleratorState._reset_state(True)
    PartialState(cpu=not torch.cuda.is_available()).device = device
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)


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


def build_cmlfa(size: Size, where: str = "meta") -> nn.Module:
    joint, image, depth, text = {"paper": (512, 768, 12, 512), "few layers": (512, 768, 2, 512)}.get(
        size, (64, 64, 1, 64)
    )
    with torch.device(where):
        geometry = ClipGeometry(joint, image, depth, 16, 77, 49408, text, depth)
        model = CMLFA(ModelSettings(loss_names="sdm+mlm+id+itc"), geometry, 11003)
    if size != "tiny":  # which runs on a CPU
        to_released_half(model)
    return model


def train_cmlfa(model: CMLFA, at: Place) -> Run:
    optimizer, precision = build_optimizer(get_args([]), model), StepPrecision("fp32", at.device)
    meters, finite = Meters(), FiniteLoss(at.device, str)

    def run() -> None:
        items = []
        for number in range(at.count):
            ids, labels = mask_tokens(token_ids(1, 77, 49405)[0])
            image = pictures(1, 384, 128)[0]
            items.append({"pids": number, "images": image, "caption_ids": ids, "mlm_ids": ids, "mlm_labels": labels})
        outputs = cmlfa_step(model, prepare_batch(collate(items), at.device), optimizer, precision)
        finite.update(outputs["loss"], 1)
        update_meters(meters, outputs, at.count)

    return run


def encode_cmlfa(model: CMLFA, at: Place) -> Run:
    pids = torch.arange(at.count)
    images, texts = [(pids, pictures(at.count, 384, 128))] * 2, [(pids, token_ids(at.count, 77, 49408))] * 2
    return lambda: Evaluator(images, texts).compute_embedding(model)


# FAFA: EVA ViT-g on 224 x 224 in float16, frozen; the Q-Former under autocast.


def build_fafa(size: Size, where: str = "meta") -> nn.Module:
    paper = read_settings("pretrain", load_pretrained=False)
    if size != "paper":
        paper = replace(paper, vit_depth=2, qformer=replace(paper.qformer, num_hidden_layers=2))
    if size == "tiny":
        small = replace(paper.qformer, hidden_size=64, num_attention_heads=1, intermediate_size=64)
        paper = replace(paper, image_size=28, vit_width=64, vit_heads=1, embed_dim=16, qformer=small)
    with bert_vocabulary() as folder, torch.device(where):
        model = Blip2FAFACPR(replace(paper, tokenizer=folder))
    if size != "tiny":
        model.store_vit_in_half()
    return model.train()


def train_fafa(model: Blip2FAFACPR, at: Place) -> Run:
    optimizer, precision = build_fafa_optimizer(model, 2e-6), StepPrecision("fp16", at.device)
    scheduler = build_scheduler(optimizer, 2e-6, 4492, 10)
    weights = {"loss_fda": 1.0, "loss_fd": 1.0, "loss_mfr": 0.5}
    meters, finite, clean = Meters(), FiniteLoss(at.device, str), BlipCaptionProcessor()
    size = model.settings.image_size

    def run() -> None:
        image = (255 * pictures(1, size, size)[0]).to(torch.uint8)
        items = [(image, image, "1 2 3 " * 6, number) for number in range(at.count)]
        images, targets, captions, groups = collate_triplets(items)
        samples = {
            "image": images.to(at.device, non_blocking=True),
            "target": targets.to(at.device, non_blocking=True),
            "text_input": [clean(caption) for caption in captions],
            "query_id": groups.to(at.device, non_blocking=True),
        }
        losses = fafa_step(model, samples, weights, optimizer, precision)
        scheduler.step()
        finite.update(losses.pop("total"), 1)
        meters.update(losses, at.count)

    return run


def encode_fafa(model: Blip2FAFACPR, at: Place) -> Run:
    size = model.settings.image_size
    images = [(number, (255 * pictures(1, size, size)[0]).to(torch.uint8)) for number in range(at.count)]
    extractor = Extractor(model, BlipCaptionProcessor(), batch_size=at.count, num_workers=0)

    def run() -> None:
        extractor.gallery(images)
        extractor.queries(images, ["1 2 3 " * 6] * len(images))

    return run


def rank_fafa(model: Blip2FAFACPR, at: Place) -> Run:
    ids = torch.arange(at.count), torch.arange(at.count).repeat(16)
    queries, gallery = (
        torch.ones(at.count, 256, device=at.device),
        torch.ones(16 * at.count, 32, 256, device=at.device),
    )
    return lambda: retrieval(queries, gallery, *ids, k=6, row_budget=1 << 30)


# DiaNA: SwinV2-B and Llama-3.2-1B under bfloat16 autocast, one process, activations kept. Its loop is transformers' Trainer.


def build_diana(stage: str) -> Callable[[Size, str], nn.Module]:
    def build(size: Size, where: str = "meta") -> nn.Module:
        config = DiaNAConfig.from_file(ROOT / "packages/diana/DiaNA/train/configs/config.json")
        sdm, queries = stage == "finetune", 16 if stage == "finetune" else 24
        config.enable_sdm = config.refiner_config["enable_sdm"] = sdm
        config.refiner_config |= {"enable_refiner": True, "num_query": queries}
        config.vision_config |= {"drop_path_rate": 0.2, "image_size": [384, 192]}
        if size != "paper":
            config.vision_config["depths"] = [1, 1, 1, 1]
            config.llama_config["num_hidden_layers"] = 2
        if size == "tiny":
            config.vision_config |= {"embed_dim": 32, "hidden_size": 256, "num_heads": [1, 2, 4, 8]}
            config.llama_config |= {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "head_dim": 32,
            }
            config.llama_config |= {"num_key_value_heads": 1, "vocab_size": 1000}
        with torch.device(where):
            return DiaNAModel(config)

    return build


class _Measured(TrainerCallback):
    """Says where the second step of a trainer begins, and leaves its loop afterwards."""

    class Done(Exception):
        pass

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise self.Done


def train_diana(length: int) -> Callable[[DiaNAModel, Place], Run]:
    def start(model: DiaNAModel, at: Place) -> Run:
        words = ["--output_dir", "unused", "--per_device_train_batch_size", str(at.count), "--max_steps", "2"]
        words += ["--bf16", "True", "--warmup_steps", "1", "--disable_tqdm", "True", "--optim", "adamw_torch_fused"]
        texts = {"input_ids": torch.ones(length, dtype=torch.int64), "attention_mask": torch.ones(length).long()}
        item = {"pixel_values": pictures(1, 384, 192)[0], "image_ids": torch.zeros(1, dtype=torch.int64), **texts}
        options = TrainOptions(length_grouping=False, use_custom_trainer=False)
        model.set_attention("auto", torch.bfloat16)
        calls: list[None] = []

        def run() -> None:
            calls.append(None)
            if len(calls) == 1:  # the trainer makes a first step of its own
                return
            args = read_trainer_flags([*TRAINER_DEFAULTS, *words], cpu=not torch.cuda.is_available())
            # Reading the flags has reset accelerate.
            with mock.patch.object(TrainingArguments, "device", at.device), accelerate_on(at.device):
                trainer = DianaTrainer(
                    model,
                    args,
                    cast(Any, [item] * (2 * at.count)),
                    SimpleNamespace(pad_token_id=0),
                    options,
                    schedule=None,
                    log_file=None,
                    replaced_images=None,
                    callbacks=[_Measured(at.begin)],
                )
                with suppress(_Measured.Done):
                    trainer.train()

        return run

    return start


def encode_diana(model: DiaNAModel, at: Place) -> Run:
    model.to(torch.bfloat16)  # as the checkpoints are
    images = pictures(at.count, 384, 192)
    ids, atts = token_ids(at.count, 256, 1000), torch.ones(at.count, 256, dtype=torch.int64)

    def run() -> None:
        with evaluating(model):
            embeds, dense = model.encode_image(images)
            finished(embeds, "fp32"), finished(model.refine(dense), "fp32")
            embeds, dense = model.encode_text(ids, atts, padding_outputs=False)
            finished(embeds, "fp32"), finished(model.refine(dense, atts.to(at.device, non_blocking=True)), "fp32")

    return run


# DP: Stable Diffusion 1.5 under bfloat16 autocast at 128 x 128, CLIP ViT-L/14 as image encoder; the README's flags.

DP_FLAGS = """--max_train_steps 30000 --train_batch_size 32 --lr 1e-5 --mixed_precision bf16 --MAX_REFERENCE_ATTRIBUTE_NUM 3
--resolution 128 --disable_flashattention --train_image_encoder --image_encoder_trainable_layers 2 --mask_loss --attribute_loc
--reference_attribute_types hair_uppercloth_bottomcloth --attribute_loc_weight 1e-3 --dataset_name unused""".split()


def build_dp(size: Size, where: str = "meta") -> nn.Module:
    args, paper = parse_args(DP_FLAGS), size == "paper"
    depth, layers = (12, 2) if paper else (2, 1)
    width, image_width = (64, 64) if size == "tiny" else (768, 1024)
    unet_stages, vae_stages = (320, 640, 1280, 1280) if paper else (64, 64, 64, 64), (128, 256, 512, 512)
    if size == "tiny":
        unet_stages = vae_stages = (32, 32, 32, 32)
    text_sizes = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    image_sizes = CLIPVisionConfig(
        hidden_size=image_width,
        intermediate_size=4 * image_width,
        num_hidden_layers=2 * depth,
        num_attention_heads=image_width // 64,
        patch_size=14,
        projection_dim=width,
    )
    with torch.device(where):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=vae_stages,
            layers_per_block=layers,
            sample_size=512,
        )
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=width, block_out_channels=unet_stages, layers_per_block=layers
        )
        text, image = CLIPTextModel(text_sizes), CLIPVisionModelWithProjection(image_sizes)
        model = DiversePersonModel(text, image, vae, unet, args)
    set_trainable(model, args, torch.bfloat16)
    return model.train()


def train_dp(model: DiversePersonModel, at: Place) -> Run:
    args = parse_args(DP_FLAGS)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    tokens = torch.zeros(1, 77, dtype=torch.bool)
    tokens[:, [5, 9, 13]] = True
    item = {
        "pix_v": pictures(1, 128, 128)[0],
        "input_ids": token_ids(1, 77, 49408),
        "img_token_mask": tokens,
        "img_token_idx": torch.tensor([[5, 9, 13]]),
        "img_token_idx_mask": torch.ones(1, 3, dtype=torch.bool),
        "attribute_v": pictures(3, 128, 128),
        "attribute_seg_maps": torch.ones(3, 128, 128),
        "reference_attribute_num": torch.tensor(3),
        "img_ids": torch.tensor(0),
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    finite = FiniteLoss(at.device, str)
    accelerator = Accelerator(mixed_precision="bf16")
    network, optimizer = accelerator.prepare(model, build_dp_optimizer(model, args))
    history = LossHistory(accelerator, finite)

    def run() -> None:
        torch.manual_seed(0)
        batch = {name: value.to(at.device, non_blocking=True) for name, value in collate_dp([item] * at.count).items()}
        losses, norm = dp_update(accelerator, network, [batch], scheduler, optimizer, trained, args)
        finite.update(losses["loss"] + norm, 1)
        history.add(1, losses, norm, 1e-5, at.count)

    return run


def sample_dp(model: DiversePersonModel, at: Place) -> Run:
    """Two denoising steps in half precision, and the decoding."""
    model.eval().requires_grad_(False).to(torch.bfloat16)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    shape = (at.count, 77, model.unet.config.cross_attention_dim)
    conditions = [torch.ones(shape, dtype=torch.bfloat16, device=at.device) for _ in range(3)]

    def run() -> None:
        latents = torch.ones(at.count, 4, 16, 16, device=at.device)
        decode_latents(model, denoise(model, scheduler, latents, *conditions, 2, 5.0, 0))

    return run


# MRA: Swin-B and BERT under bfloat16 autocast; pre-training on SDA, fine-tuning on CUHK-PEDES, its evaluation.


def build_mra(task: str) -> Callable[[Size, str], nn.Module]:
    def build(size: Size, where: str = "meta") -> nn.Module:
        config = load_config(f"configs/{task}.yaml")
        vision, text = (read_json(PACKAGE / config[key]) for key in ("vision_config", "text_config"))
        if size != "paper":
            vision["depths"], config["lr_2"] = [1, 1, 1, 1], False  # which names layers
            text |= {"num_hidden_layers": 4, "fusion_layer": 2}
        if size == "tiny":
            vision |= {"embed_dim": 32, "num_heads": [1, 2, 4, 8], "vision_width": 256}
            text |= {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
        config |= {"vision_config": vision, "text_config": text}
        with torch.device(where):
            return Retrieval(config, init_backbones=False)

    return build


def train_mra(task: str) -> Callable[[Retrieval, Place], Run]:
    def start(model: Retrieval, at: Place) -> Run:
        config = load_config(f"configs/{task}.yaml")
        optimizer, precision = create_optimizer(model, config["optimizer"]), StepPrecision("bf16", at.device)
        schedule = Schedule(optimizer, config["schedular"], 1000)
        meters, finite, weight = Meters(), FiniteLoss(at.device, str), config["region"]
        image = pictures(1, config["h"], config["w"])[0]
        atts = torch.ones(1 + model.settings.vision.num_tokens)
        atts[1:9] = 0  # inside the box
        caption = "1 2 3 " * 8
        pairs: Any = [(image, caption, caption, atts, "4 5 6", number, number) for number in range(at.count)]
        with bert_vocabulary() as folder:
            items = TrainingItems(pairs, build_tokenizer(folder), config)

        def run() -> None:
            batch = mra_to_device(items.collate([items[number] for number in range(at.count)]), at.device)
            losses, _ = mra_step(model, batch, weight, optimizer, precision)
            schedule.set_rates(1)
            meters.update(losses)
            finite.update(losses["loss"], 1)

        return run

    return start


def judge_mra(model: Retrieval, at: Place) -> Run:
    """Encoders, and the judgement of a fifth of all pairs, as with `--amp_eval`."""
    model.eval()
    count, gallery = at.count, max(2, at.count // 5)
    images = pictures(2 * gallery, model.settings.vision.height, model.settings.vision.width)
    ids, atts = token_ids(count, 56, 30522), (torch.arange(56) < torch.randint(12, 56, (count, 1))).long()
    candidates = torch.stack([torch.randperm(2 * gallery)[:gallery] for _ in range(count)])

    def run() -> None:
        with torch.autocast(at.device.type, torch.bfloat16):
            tokens, _ = encode_images(model, images.to(at.device, non_blocking=True))
            texts, _ = encode_texts(model, ids.to(at.device, non_blocking=True), atts.to(at.device, non_blocking=True))
            match_logits(Matcher(model, texts, atts), candidates, tokens)

    return run


SYSTEMS = {
    "cmlfa": System(
        build_cmlfa,
        {"training step": Phase(train_cmlfa, 64, "pairs"), "encoding": Phase(encode_cmlfa, 512, "pairs")},
    ),
    "fafa": System(
        build_fafa,
        {
            "training step": Phase(train_fafa, 256, "triplets"),
            "encoding": Phase(encode_fafa, 64, "pictures, with and without caption"),
            "ranking": Phase(rank_fafa, 256, "queries, 16 times as many pictures"),
        },
    ),
    "mra sda": System(build_mra("sda"), {"training step": Phase(train_mra("sda"), 40, "pairs")}),
    "mra cuhk": System(
        build_mra("cuhk"),
        {
            "training step": Phase(train_mra("cuhk"), 40, "pairs"),
            "encoders and judge": Phase(judge_mra, 200, "captions with 40 of 80 pictures"),
        },
    ),
    "diana pre-training": System(
        build_diana("pretrain"), {"training step": Phase(train_diana(104), 64, "pairs of 104 tokens")}
    ),
    "diana fine-tuning": System(
        build_diana("finetune"),
        {
            "training step": Phase(train_diana(400), 32, "pairs of 400 tokens"),
            "encoding": Phase(encode_diana, 64, "pictures, dialogues of 256 tokens"),
        },
    ),
    "dp_gen": System(
        build_dp,
        {
            "training step": Phase(train_dp, 32, "pictures of 128 x 128"),
            "sampling, 2 steps": Phase(sample_dp, 16, "pictures of 128 x 128"),
        },
    ),
}
