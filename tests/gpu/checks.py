"""What `run` does in one process on a device: steps of all systems, numbers against the CPU, precisions, one process of DDP.

Every function yields rows: mappings with `what`, figures by name, and `ok` where something can be wrong.
"""

import contextlib
import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from paper_systems import SYSTEMS, Place, Size, accelerate_on, pictures, token_ids
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench_fafa_full_size import PEAKS
from fafa.optim import build_optimizer
from fafa.train import training_step
from tbps_common.bench.timer import measure
from tbps_common.ranking import retrieve
from tbps_common.run.distributed import Ranks
from tbps_common.run.precision import StepPrecision
from tbps_common.run.session import Run as TrainingRun

Row = dict[str, Any]
TINY_COUNT = 4


class _Operations(TorchDispatchMode):
    """Counts floating-point operations; torch's `FlopCounterMode` also hooks into modules, which needs gradients."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            self.count += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def steps(name: str, device: torch.device, size: Size, repeats: int) -> Iterator[Row]:
    """Milliseconds, items per second, memory and share of the peak of each phase of a system."""
    system, on_gpu = SYSTEMS[name], device.type == "cuda"
    for label, phase in system.phases.items():
        count = TINY_COUNT if size == "tiny" else phase.count
        began = time.perf_counter()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)

        def begin() -> None:
            nonlocal began
            if on_gpu:
                torch.cuda.synchronize(device)
            began = time.perf_counter()

        torch.manual_seed(0)
        with accelerate_on(device):
            run = phase.start(system.build(size, str(device)), Place(device, count, begin))
            run()
            seconds = []
            for _ in range(repeats):
                begin()
                run()
                if on_gpu:
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - began)
            with _Operations() as operations:
                run()
        row: Row = {"what": f"{name}: {label}, {count} {phase.items}", "ms": 1000 * min(seconds)}
        row["items/s"] = count / min(seconds)
        if on_gpu:
            row["GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
            peak = next((value for card, value in PEAKS.items() if card in torch.cuda.get_device_name(device)), None)
            # The trainer's run makes two steps, of which one is timed.
            flop = operations.count / (2 if "diana" in name and "training" in label else 1)
            row |= {"MFU %": 100 * flop / min(seconds) / 1e12 / peak} if peak else {}
        yield row
        del run
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def _features(name: str, model: Any) -> list[Tensor]:
    """Features of a tiny network in float32, without random draws."""
    generator, device = torch.Generator().manual_seed(1), next(model.parameters()).device

    def images(height: int, width: int) -> Tensor:
        return torch.randn(4, 3, height, width, generator=generator).to(device)

    def ids(length: int) -> Tensor:
        return torch.randint(1, 999, (4, length), generator=generator).to(device)

    if name == "cmlfa":
        return [model.encode_image(images(384, 128)), model.encode_text(ids(77))]
    if name == "fafa":
        states = model.evaluation_states(images(28, 28))
        return [model.target_features(states), model.query_features(states, ["1 2 3"] * 4)]
    if name.startswith("mra"):
        pictures, texts = images(model.settings.vision.height, model.settings.vision.width), ids(56)
        tokens, mask = model.get_vision_embeds(pictures)
        words = model.get_text_embeds(texts, torch.ones_like(texts))
        return [model.get_image_feat(tokens), model.get_cross_embeds(tokens, mask, words, torch.ones_like(texts))]
    if name.startswith("diana"):
        texts = ids(64)
        image, text = model.encode_image(images(384, 192)), model.encode_text(texts, torch.ones_like(texts))
        return [image[0], text[0], model.refine(image[1]), model.refine(text[1])]
    condition = model.encode_text(ids(77))
    latents = torch.randn(4, 4, 16, 16, generator=generator).to(device)
    pixels = images(128, 128).clamp(-1, 1)
    return [
        model.unet(latents, torch.tensor([1, 10, 100, 900], device=device), condition).sample,
        model.vae.encode(pixels).latent_dist.mean,
        model.encode_image(pixels[:, None].clamp(0, 1)),
    ]


@torch.no_grad()
def numerics(device: torch.device) -> Iterator[Row]:
    """Largest difference of the features of tiny networks from those of the CPU, relative to the largest feature."""
    for name, system in SYSTEMS.items():
        torch.manual_seed(0)
        model: Any = system.build("tiny", "cpu").eval().float()
        expected = _features(name, model)
        if name == "fafa":
            model.autocast_dtype = None
        found = _features(name, copy.deepcopy(model).to(device))
        pairs = zip(expected, found)
        worst = max(float((one - other.cpu()).abs().max() / one.abs().max()) for one, other in pairs)
        yield {"what": f"{name}: features against the CPU", "difference": worst, "ok": worst < 1e-3}


def ranking(device: torch.device, queries: int, gallery: int) -> Iterator[Row]:
    """`retrieve` on the device against its bare matrix product."""
    generator = torch.Generator(device).manual_seed(0)
    query = F.normalize(torch.randn(queries, 256, device=device, generator=generator), dim=-1)
    images = F.normalize(torch.randn(gallery, 32, 256, device=device, generator=generator), dim=-1)
    q_ids, g_ids = torch.arange(queries), torch.arange(gallery) % queries
    flat, step = images.flatten(0, 1).t(), 256
    out = torch.empty(min(step, queries), flat.shape[1], device=device)

    def product() -> None:
        for part in query.split(step):
            torch.mm(part, flat, out=out[: len(part)])

    def ours() -> None:
        retrieve(query, images, q_ids, g_ids, reduce="topk_mean", k=6)

    costs = measure({"product": product, "ours": ours}, repeats=2, device=device)
    row: Row = {"what": f"ranking of {queries} x {gallery} x 32 tokens", "ms": costs["ours"].milliseconds}
    yield {**row, "x bare product": costs["ours"].seconds / costs["product"].seconds}


def precisions(device: torch.device, size: Size, repeats: int) -> Iterator[Row]:
    """A step of FAFA in float16 with a gradient scaler, in bfloat16, with a compiled ViT, and with an unfused optimizer."""
    forms = [("fp16 with GradScaler", "fp16", True, False), ("bf16", "bf16", True, False)]
    if device.type == "cuda":
        forms += [("fp16, unfused AdamW", "fp16", False, False), ("fp16, --compile", "fp16", True, True)]
    for what, precision_name, fused, compiled in forms:
        torch.manual_seed(0)
        model: Any = SYSTEMS["fafa"].build(size, str(device))
        optimizer = build_optimizer(model, 1e-6)
        if not fused:
            optimizer = torch.optim.AdamW(optimizer.param_groups[0]["params"], lr=1e-6, foreach=True)
        if compiled:
            model.compile_vit()
        precision, count = StepPrecision(precision_name, device), TINY_COUNT if size == "tiny" else 64
        image = pictures(count, model.settings.image_size, model.settings.image_size).to(device)
        samples = {
            "image": image,
            "target": image,
            "text_input": ["1 2 3"] * count,
            "query_id": torch.arange(count).to(device),
        }
        step = partial(training_step, model, samples, {}, optimizer, precision)
        cost = measure({"step": step}, repeats=repeats, device=device)["step"]
        row: Row = {"what": f"fafa: step of {count}, {what}", "ms": cost.milliseconds}
        yield {**row, "ok": bool(step()["total"].isfinite())}
        del model, optimizer, step
        gc.collect()


def distributed(device: torch.device) -> Iterator[Row]:
    """Gradients of DistributedDataParallel in one process against those of the bare network: CMLFA, tiny, no dropout."""
    torch.manual_seed(0)
    bare: Any = SYSTEMS["cmlfa"].build("tiny", str(device)).eval()
    wrapped = copy.deepcopy(bare)
    ids = token_ids(4, 77, 49405).to(device)
    batch = {"images": pictures(4, 384, 128).to(device), "pids": torch.arange(4).to(device), "caption_ids": ids}
    batch |= {"mlm_ids": ids, "mlm_labels": ids, "mlm_positions": torch.arange(8).to(device)}

    def gradients(network: Callable[..., Any], model: Any) -> list[Tensor]:
        sum(value for name, value in network(batch).items() if "loss" in name).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            run = TrainingRun(Ranks(0, 2), device, *[None] * 3)  # type: ignore[arg-type]
            found = gradients(run.distribute(wrapped, unused=wrapped.unused_parameters), wrapped)
        finally:
            dist.destroy_process_group()
    expected = gradients(bare, bare)
    worst = max(float((one - other).abs().max()) for one, other in zip(expected, found))
    ok = len(found) == len(expected) and worst <= 1e-5
    yield {"what": f"cmlfa: gradients under DDP ({backend})", "difference": worst, "ok": ok}


def all_checks(device: torch.device, size: Size, repeats: int) -> Iterator[Row]:
    """All rows, the quick checks first; one that fails is a row with `error`, and the next one follows."""
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        ("numerics", lambda: numerics(device)),
        ("DDP", lambda: distributed(device)),
        ("ranking", lambda: ranking(device, *((2202, 20510) if size == "paper" else (64, 512)))),
        *((name, lambda name=name: steps(name, device, size, repeats)) for name in SYSTEMS),
        ("precisions", lambda: precisions(device, size, repeats)),
    ]
    for name, part in parts:
        try:
            yield from part()
        except Exception as error:  # of any kind: a kernel that is missing, no memory
            with contextlib.suppress(RuntimeError):
                gc.collect()
                torch.cuda.empty_cache()
            yield {"what": name, "ok": False, "error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
