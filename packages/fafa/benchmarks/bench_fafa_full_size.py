"""The paper's model with random weights: time of a step, throughput, share of the GPU's peak, memory."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench_fafa_direct import direct_losses
from bench_fafa_forms import Row, milliseconds
from bench_fafa_model import build_model, random_batch
from fafa.optim import build_optimizer
from tbps_common.errors import InputError

# Dense tensor-core peaks in float16 and bfloat16, TFLOP/s, from the makers' data sheets.
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0, "4090": 165.0, "V100": 125.0}


def full_size(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Training steps as the paper runs them (fp16 autocast, loss scaling), and the encoding of a gallery.

    Raises:
        InputError: neither the first step of the direct form nor of ours fits the GPU.
    """
    model = build_model(args, device)
    samples, draws = random_batch(args, model)
    gigaflop = _forward_backward_flop(args, model) / 1e9
    forms: dict[str, Callable[..., Any]] = {"direct": direct_losses, "ours": lambda model, *rest: model(*rest)}
    times, memory = {}, {}
    for name, forward in forms.items():
        try:
            times[name], memory[name] = _step_time(args, model, samples, draws, forward, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    if "ours" not in times:
        raise InputError(f"--batch-size {args.batch_size} does not fit this GPU; lower it.")
    rows = _step_rows("training step", args, times, memory, gigaflop, device)
    if args.compile:
        model.compile_vit()
        time, peak = _step_time(args, model, samples, draws, forms["ours"], device)
        rows += _step_rows("compiled ViT: training step", args, {"ours": time}, {"ours": peak}, gigaflop, device)
    model.eval()
    encode = milliseconds({"ours": lambda: model.extract_target_features(samples["image"])}, args.repeats, device)
    rows.append({"what": "gallery encoding, images/s", "ours": 1000 * args.batch_size / encode["ours"]})
    return rows


def _step_time(
    args: argparse.Namespace, model: Any, samples: Any, draws: Any, forward: Callable[..., Any], device: torch.device
) -> tuple[float, float]:
    """Milliseconds of a step, and peak memory in GiB."""
    optimizer = build_optimizer(model, 1e-9)
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)

    def step() -> None:
        optimizer.zero_grad()
        with model.maybe_autocast():
            loss = torch.stack([value.float() for value in forward(model, samples, draws).values()]).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    time = milliseconds({"step": step}, args.repeats, device)["step"]
    return time, torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else float("nan")


def _forward_backward_flop(args: argparse.Namespace, model: Any) -> float:
    """FLOP of a step, counted at two triplets and scaled: all but the similarities is proportional to the batch."""
    small = argparse.Namespace(**{**vars(args), "batch_size": 2})
    samples, draws = random_batch(small, model)
    with FlopCounterMode(display=False) as counter:
        with model.maybe_autocast():
            loss = torch.stack([value.float() for value in model(samples, draws).values()]).sum()
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops() / 2 * args.batch_size


def _step_rows(
    what: str,
    args: argparse.Namespace,
    times: dict[str, float],
    memory: dict[str, float],
    gigaflop: float,
    device: torch.device,
) -> list[Row]:
    rows: list[Row] = [
        {"what": f"{what}, ms", **times},
        {
            "what": f"{what}, images/s",
            **{name: 2000 * args.batch_size / time for name, time in times.items()},
            "more_is_better": True,
        },
    ]
    if device.type == "cuda":
        rows.append({"what": f"{what}, peak memory GiB", **memory})
        name = torch.cuda.get_device_name(device)
        peak = args.peak_tflops or next((value for key, value in PEAKS.items() if key in name), None)
        if peak:
            mfu = {form: 100 * gigaflop / time / peak for form, time in times.items()}
            rows.append({"what": f"{what}, % of {peak:g} TFLOP/s", **mfu, "more_is_better": True})
    rows.append({"what": f"{what}, TFLOP", "ours": gigaflop / 1000})
    return rows
