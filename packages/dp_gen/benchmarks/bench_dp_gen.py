"""`python packages/dp_gen/benchmarks/bench_dp_gen.py`: a training step, its parts, and annotation, each against another form.

The direct form of a step, like the released code, encodes every reference slot, padding too, waits for the host to read
each loss, updates the parameters one tensor at a time, and calls the garbage collector every time. Both forms take turns
in one process on the same weights, data and noise; the fastest of the repeats counts. Times on the CPU are CPU times, which
other programs hardly disturb; on a GPU they are wall times. The losses of both must be equal: a saving that changes them
does not count. Annotation is wall time, against a server on this machine that takes its time for each answer; the two
outputs must be equal.
"""

import argparse
import platform
import sys
import time
from typing import TYPE_CHECKING, Any

from tbps_common.bench.timer import Cost, measure
from tbps_common.run.arguments import HelpFormatter, number, whole_number
from tbps_common.run.command import command

if TYPE_CHECKING:
    from torch import Tensor

    from dp_gen.model import DiversePersonModel

Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The flags of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python packages/dp_gen/benchmarks/bench_dp_gen.py", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--full-size", action="store_true", help="Stable Diffusion 1.5 and ViT-L/14 with random weights"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--batch_size", type=whole_number(1), default=4, help="samples per step")
    parser.add_argument("--resolution", type=whole_number(64), default=128, help="side of the images, in pixels")
    parser.add_argument(
        "--references", type=whole_number(0), default=2, help="reference slots, of 3, that every sample uses"
    )
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="timed repeats; the fastest counts")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="CPU threads")
    parser.add_argument("--rows", type=whole_number(1), default=32, help="rows to annotate")
    parser.add_argument("--latency", type=number(0), default=0.5, help="seconds the server takes for each answer")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


@command
def main(argv: list[str]) -> int:
    """Parse the flags, measure, print a table."""
    args = build_parser().parse_args(argv)
    import torch

    from tbps_common.errors import InputError
    from tbps_common.files import write_json

    if args.references > 3:
        raise InputError(f"--references {args.references} is more than the 3 slots: lower it")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was given, but torch finds no GPU: use --device cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [*training_step(args), *capture_cost(args), *annotation(args)]
    size = "full size" if args.full_size else "tiny"
    print(f"{size}, batch {args.batch_size}, {args.threads} thread(s), {args.device}, torch {torch.__version__}")
    print(f"{'':38}{'this package':>14}{'other form':>14}{'ratio':>8}")
    for row in rows:
        ratio = row["other"] / row["ours"]
        print(f"{row['what']:38}{row['ours']:>14.4g}{row['other']:>14.4g}{ratio:>8.2f}  {row['form']}")
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name != "json"}
        write_json(args.json, {"flags": flags, "torch": torch.__version__, "machine": platform.machine(), "rows": rows})
    return 0


def training_step(args: argparse.Namespace) -> list[Row]:
    """A whole step, its loss, and its forward FLOPs, of both forms on twin models.

    Raises:
        InputError: the two forms' losses differ by more than rounding.
    """
    import copy
    import gc

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dp_gen.optim import build_optimizer, set_trainable
    from dp_gen.options import parse_args
    from tbps_common.errors import InputError

    flags = parse_args(
        "--train_image_encoder --image_encoder_trainable_layers 2 --mask_loss --attribute_loc --attribute_loc_weight "
        f"1e-3 --lr 1e-5 --MAX_REFERENCE_ATTRIBUTE_NUM 3 --resolution {args.resolution}".split()
    )
    ours = build_model(args, flags)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    set_trainable(ours, flags, dtype)
    direct = copy.deepcopy(ours)
    batch, draws, scheduler = random_batch(args, ours)
    optimizer = build_optimizer(ours, flags)
    groups = [{"params": group["params"]} for group in build_optimizer(direct, flags).param_groups]
    direct_optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=1e-2, foreach=False, fused=False)
    losses: dict[str, float] = {}

    def forward(model: "DiversePersonModel", encode_all: bool) -> "dict[str, Tensor]":
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            if encode_all:
                return direct_forward(model, batch, scheduler, draws)
            return model(batch, scheduler, draws)

    def step() -> None:
        found = forward(ours, False)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.setdefault("ours", float(found["loss"].detach()))

    def direct_step() -> None:
        found = forward(direct, True)
        found["loss"].backward()
        direct_optimizer.step()
        direct_optimizer.zero_grad(set_to_none=False)
        for loss in found.values():
            float(loss.detach())
        float(found["loss"].detach())
        losses.setdefault("direct", float(found["loss"].detach()))
        gc.collect()

    flops = {}
    with torch.no_grad():
        for name, model, encode_all in (("ours", ours, False), ("direct", direct, True)):
            with FlopCounterMode(display=False) as counter:
                forward(model, encode_all)
            flops[name] = counter.get_total_flops() / 1e9 / args.batch_size
    costs = measure({"direct": direct_step, "ours": step}, repeats=args.repeats, device=args.device)
    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-4
    if abs(losses["ours"] - losses["direct"]) > allowed * abs(losses["direct"]):
        raise InputError(f"the losses of both forms differ: {losses['ours']:.6g} and {losses['direct']:.6g}")
    return [
        duration_row("training step, ms", costs["ours"], costs["direct"], "direct form"),
        {
            "what": "forward GFLOP per sample",
            "ours": flops["ours"],
            "other": flops["direct"],
            "form": "every slot encoded",
        },
        {"what": "loss of the first step", "ours": losses["ours"], "other": losses["direct"], "form": "direct form"},
        *memory_row(args, "training step", costs["ours"], costs["direct"], "direct form"),
    ]


def direct_forward(
    model: "DiversePersonModel", batch: "dict[str, Tensor]", scheduler: Any, draws: "dict[str, Tensor]"
) -> "dict[str, Tensor]":
    """The forward pass with every slot encoded."""

    def encode_condition(whole: Any) -> Any:
        return model.controller(
            model.encode_text(whole["input_ids"]),
            model.encode_image(whole["attribute_v"]),
            whole["img_token_mask"],
            whole["reference_attribute_num"],
        )

    model.encode_condition = encode_condition  # type: ignore[method-assign]
    try:
        return model(batch, scheduler, draws)
    finally:
        del model.encode_condition


def capture_cost(args: argparse.Namespace) -> list[Row]:
    """U-Net forward and backward, with the attention captured and with the fused kernel everywhere."""
    import torch

    from dp_gen.options import parse_args

    flags = parse_args(f"--attribute_loc --resolution {args.resolution}".split())
    model = build_model(args, flags)
    assert model.capture is not None
    capture, side = model.capture, args.resolution // 8
    latents = torch.randn(args.batch_size, 4, side, side, device=args.device)
    steps = torch.full((args.batch_size,), 500, device=args.device)
    text = torch.randn(args.batch_size, 77, model.text_encoder.config.hidden_size, device=args.device)

    cast = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")

    def captured() -> None:
        with capture.recording() as maps, cast:
            found = model.unet(latents, steps, text).sample
        (found.square().mean() + sum(probabilities[:, :, 1].mean() for probabilities in maps.values())).backward()
        model.unet.zero_grad()

    def fused() -> None:
        with cast:
            found = model.unet(latents, steps, text).sample
        found.square().mean().backward()
        model.unet.zero_grad()

    costs = measure({"captured": captured, "fused": fused}, repeats=args.repeats, device=args.device)
    what, form = "U-Net step, attention captured", "fused kernel, nothing captured"
    return [
        duration_row(f"{what}, ms", costs["captured"], costs["fused"], form),
        *memory_row(args, what, costs["captured"], costs["fused"], form),
    ]


def annotation(args: argparse.Namespace) -> list[Row]:
    """`annotate.py` with 8 requests in flight and with one, by the clock.

    Raises:
        InputError: an annotation failed, or the two outputs differ.
    """
    import json
    import os
    import tempfile
    from pathlib import Path

    from dp_gen.annotate import main as annotate
    from tbps_common.errors import InputError
    from tbps_world.practice.captions import answer
    from tbps_world.practice.server import PracticeServer

    def slow_answer(messages: "list[dict[str, Any]]") -> str:
        time.sleep(args.latency)
        return answer(messages)

    key = "DP_GEN_BENCH_KEY"
    os.environ[key] = "none-needed"
    seconds, outputs = {}, {}
    with tempfile.TemporaryDirectory() as folder, PracticeServer(slow_answer) as server:
        source = Path(folder, "edits.jsonl")
        sentence = "Person number {} is wearing a red coat and black trousers, and walks along a street."
        row = {"reference_attribute_list": ["green shirt", "white skirt"]}
        lines = (json.dumps({"base_description": sentence.format(number), **row}) for number in range(args.rows))
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for concurrency in (0, 8, 1):  # the first, of one row, imports the client and is not timed
            output = Path(folder, f"{concurrency}.jsonl")
            flags = ["--origin_path", str(source), "--output_path", str(output), "--base_url", server.url]
            flags += ["--concurrency", str(concurrency or 1), "--TEXT_END", "-1" if concurrency else "1"]
            began = time.perf_counter()
            status = annotate([*flags, "--api_key_env", key])
            seconds[concurrency] = time.perf_counter() - began
            if status:
                raise InputError("the annotation failed: see the messages above")
            outputs[concurrency] = output.read_bytes()
    if outputs[8] != outputs[1]:
        raise InputError("annotations with 8 requests in flight differ from those with one")
    what = f"annotate.py, {args.rows} rows, s"
    return [{"what": what, "ours": seconds[8], "other": seconds[1], "form": "one request at a time"}]


def build_model(args: argparse.Namespace, flags: argparse.Namespace) -> "DiversePersonModel":
    """Random weights: the tiny models, or Stable Diffusion 1.5 with CLIP ViT-L/14."""
    import tempfile

    from dp_gen.model import DiversePersonModel
    from dp_gen.model.hub import BASE_MODEL, IMAGE_ENCODER

    if not args.full_size:
        from tbps_world.tiny.dp_gen import write_tiny_models

        with tempfile.TemporaryDirectory() as folder:
            write_tiny_models(folder, ["a", "person"])
            flags.pretrained_model_hf, flags.image_encoder_hf = f"{folder}/{BASE_MODEL}", f"{folder}/{IMAGE_ENCODER}"
            return DiversePersonModel.from_pretrained(flags).to(args.device)
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    image = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
            projection_dim=768,
        )
    )
    vae_settings: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768, sample_size=64
    )
    return DiversePersonModel(text, image, AutoencoderKL(**vae_settings), unet, flags).to(args.device)


def random_batch(
    args: argparse.Namespace, model: "DiversePersonModel"
) -> "tuple[dict[str, Tensor], dict[str, Tensor], Any]":
    """A batch in which every sample uses `--references` of 3 slots, its noise, and the noise schedule."""
    import torch
    from diffusers import DDPMScheduler

    count, side, slots, used = args.batch_size, args.resolution, 3, args.references
    positions = torch.tensor([3, 8, 13]) * (torch.arange(slots) < used)
    mask = torch.zeros(count, 77, dtype=torch.bool)
    mask[:, positions[:used]] = True
    batch = {
        "pix_v": torch.rand(count, 3, side, side) * 2 - 1,
        "input_ids": torch.randint(0, 500, (count, 77)),
        "img_token_mask": mask,
        "img_token_idx": positions.expand(count, -1).contiguous(),
        "img_token_idx_mask": (torch.arange(slots) < used).expand(count, -1).contiguous(),
        "attribute_v": torch.rand(count, slots, 3, side, side),
        "attribute_seg_maps": (torch.rand(count, slots, side, side) > 0.7).float(),
        "reference_attribute_num": torch.full((count,), used),
        "img_ids": torch.arange(count),
    }
    shape = (count, 4, side // 8, side // 8)
    dtype = model.vae.dtype
    draws = {
        "posterior_noise": torch.randn(shape).to(args.device, dtype),
        "noise": torch.randn(shape).to(args.device, dtype),
        "timesteps": torch.randint(0, 1000, (count,)).to(args.device),
        "mask_uniform": torch.tensor(0.1),
    }
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return {name: tensor.to(args.device) for name, tensor in batch.items()}, draws, scheduler


def duration_row(what: str, ours: Cost, other: Cost, form: str) -> Row:
    return {"what": what, "ours": ours.milliseconds, "other": other.milliseconds, "form": form}


def memory_row(args: argparse.Namespace, what: str, ours: Cost, other: Cost, form: str) -> list[Row]:
    """MiB that both forms need on the GPU at their peak, beyond what is there before (weights, optimizer state)."""
    if args.device != "cuda":
        return []
    return [{"what": f"{what}, peak MiB", "ours": ours.peak_mib, "other": other.peak_mib, "form": form}]


if __name__ == "__main__":
    sys.exit(main())
