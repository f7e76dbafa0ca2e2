"""`fafa-syncpr lora`: fine-tune a text-to-image model, so that its wide pictures show one person twice.

Every number depends on the seed, the step and the item, so that a resumed run is exact.
"""

import argparse
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fafa.syncpr.denoising import LORA_TARGETS, Denoising, denoising_of
from fafa.syncpr.pairs import CAPTIONS
from fafa.syncpr.text_to_image import load_pipeline
from tbps_common.errors import CheckpointError, DatasetError, InputError
from tbps_common.files import atomic_path
from tbps_common.images import check_images_exist, read_image
from tbps_common.pipeline import Journal, begin_manifest, finish_manifest, read_json_lines
from tbps_common.pipeline.models import choose_dtype, quiet_libraries, require_libraries, require_model
from tbps_common.run.batches import EpochBatches, SeededItems, replaced_items
from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import barrier
from tbps_common.run.progress import progress_bar
from tbps_common.run.session import Run, training_run
from tbps_common.run.stop import FiniteLoss

logger = logging.getLogger("fafa.syncpr")

WEIGHTS, STATE = "pytorch_lora_weights.safetensors", "training_state.pt"
_LARGEST_GRADIENT = 1.0
_SETTINGS = "model revision rank batch_size learning_rate warmup height width caption_dropout seed dtype".split()


def main(flags: argparse.Namespace) -> int:
    """Check the flags and the pictures, then train; returns the exit status.

    Raises:
        InputError: flags, pictures or the model cannot be used.
        FloatingPointError: a loss is not a finite number.
    """
    if flags.height % 16 or flags.width % 16:
        raise InputError(f"--height {flags.height} and --width {flags.width} must be multiples of 16")
    require_libraries("fafa-syncpr lora", "packages/fafa[syncpr]", "diffusers", "transformers", "peft")
    require_model("--model", flags.model, "model_index.json")
    items = read_captions(flags.data)
    with training_run("fafa.syncpr", device=flags.device) as run:
        return train(flags, items, run)


def train(flags: argparse.Namespace, items: Sequence[tuple[str, str]], run: Run) -> int:
    """Train to `flags.steps`, from the last saved state if there is one; returns the exit status.

    Args:
        flags: of `fafa-syncpr lora`.
        items: paths and captions of the pictures.
        run: of this process.
    """
    out, size, device = Path(flags.out), (flags.height, flags.width), run.device
    batches = EpochBatches(
        len(items), flags.batch_size, seed=flags.seed, rank=run.ranks.rank, world_size=run.ranks.world_size
    )
    dtype = choose_dtype(flags.dtype, device, on_gpu="bfloat16")
    logger.info("%s", device_sentence(flags.device, device, str(dtype).removeprefix("torch.")))
    method = denoising_of(load_pipeline(flags.model, flags.revision, dtype))
    parameters = add_lora(method, flags.rank, flags.seed)
    method.pipeline.to(device)
    if flags.gradient_checkpointing:
        method.denoiser.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters.values(), lr=flags.learning_rate, weight_decay=1e-2)
    replaced = replaced_items(flags.bad_images, len(items))
    data = SeededItems(CaptionedPictures(items, size, method.latent_size(*size), flags.caption_dropout), replaced)
    loader = DataLoader(data, batch_sampler=batches, num_workers=flags.num_workers)
    if run.is_main:
        settings = {name: getattr(flags, name) for name in _SETTINGS}
        settings |= {"data": _fingerprint(items), "processes": run.ranks.world_size}
        begin_manifest(out / WEIGHTS, settings, {"command": "fafa-syncpr lora"})
    barrier()
    step = _resume(out / STATE, parameters, optimizer)
    saved_at = time.perf_counter()

    def save() -> None:
        nonlocal saved_at
        if replaced is not None and (sentence := replaced.report(lambda index: items[index][0])):
            logger.warning("%s", sentence)
        if run.is_main:
            weights = {name: value.detach().cpu() for name, value in parameters.items()}
            state = {"step": step, "weights": weights, "optimizer": optimizer.state_dict()}
            # In this order: where there is a state, the file is as new and its manifest binds the next run.
            save_lora(method, out)
            save_checkpoint(state, out / STATE)
            seconds, saved_at = time.perf_counter() - saved_at, time.perf_counter()
            items_of_run = max(flags.steps, step)
            done = step >= flags.steps
            finish_manifest(out / WEIGHTS, finished=done, items=items_of_run, kept=step, dropped={}, seconds=seconds)
        barrier()

    if step >= flags.steps:
        save()  # the manifest was begun anew
        logger.info("all %d steps are done already: %s", flags.steps, out / WEIGHTS)
        return 0
    finite, losses, since = FiniteLoss(device, partial(_not_finite, out)), torch.zeros((), device=device), step
    cast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    with (
        _open_log(out / "log.jsonl", step) if run.is_main else nullcontext() as log,
        progress_bar(flags.steps, initial=step, unit="step", enabled=run.is_main) as bar,
    ):
        for batch in _endless(loader, batches, step):
            rate = flags.learning_rate * min(1.0, (step + 1) / max(flags.warmup, 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            latents = method.latents(moved["pixels"], moved["posterior_noise"])
            texts = method.encode(batch["caption"])
            with cast:
                loss = method.loss(latents, texts, moved["noise"].to(latents.dtype), moved["uniform"])
            loss.backward()
            _average_gradients(parameters, run)
            nn.utils.clip_grad_norm_(parameters.values(), _LARGEST_GRADIENT)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            losses += loss.detach()
            finite.update(loss.detach(), step)
            stopping = run.stop_requested()
            last = step == flags.steps or stopping
            if last or step % flags.log_every == 0 or step % flags.save_every == 0:
                finite.require()
            if last or step % flags.log_every == 0:
                mean = float(losses) / (step - since)
                losses.zero_()
                since = step
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                if log is not None:
                    log.append({"step": step, "loss": mean, "lr": rate})
            if last or step % flags.save_every == 0:
                save()
            if last:
                break
    if step < flags.steps:
        logger.info("stopped after step %d; run the same command again to continue", step)
        return run.exit_status
    return 0


def _open_log(path: Path, step: int) -> Journal:
    """The log without the lines after the last state, which a run wrote that was killed."""
    log = Journal(path)
    log.rewrite([line for line in log.records if line["step"] <= step])
    return log


def _endless(loader: "DataLoader[Any]", batches: EpochBatches, step: int) -> Iterator[dict[str, Any]]:
    """The batches from a step on."""
    epoch, first = divmod(step, batches.batches_per_epoch)
    while True:
        batches.set_position(epoch, first)
        yield from loader
        epoch, first = epoch + 1, 0


def _average_gradients(parameters: dict[str, nn.Parameter], run: Run) -> None:
    """Mean over the processes, in one message: a LoRA is small."""
    if not run.ranks.distributed:
        return
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= run.ranks.world_size
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def _not_finite(out: Path, step: int) -> str:
    return (
        f"the loss of step {step} is not a finite number: lower --learning-rate, or use --dtype bfloat16 or float32; the last "
        f"good state is in {out}"
    )


def _resume(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load the last state, if there is one; returns the steps it has done."""
    if not path.exists():
        return 0
    state = load_checkpoint_file(path)
    try:
        if set(state["weights"]) != set(parameters):
            raise KeyError("weights")
        with torch.no_grad():
            for name, value in state["weights"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a state of this training; delete it to start again") from error
    logger.info("resuming after step %d", step)
    return step


def _fingerprint(items: Sequence[tuple[str, str]]) -> str:
    lines = "\n".join(f"{Path(image).name}\t{caption}" for image, caption in items)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


class CaptionedPictures(Dataset[dict[str, Any]]):
    """Pictures with everything random that a step needs of them: noise, time, and whether the caption is left out.

    `SeededItems` seeds the generators of an item, so these draws depend on (seed, epoch, index) alone.
    """

    def __init__(
        self, items: Sequence[tuple[str, str]], size: tuple[int, int], latents: tuple[int, int, int], drop: float
    ):
        self.items, self.size, self.latents, self.drop = items, size, latents, drop

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, caption = self.items[index]
        height, width = self.size
        picture = read_image(path).resize((width, height))
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
        return {
            "pixels": pixels,
            "caption": "" if float(torch.rand(())) < self.drop else caption,
            "uniform": torch.rand(()),
            "noise": torch.randn(self.latents),
            "posterior_noise": torch.randn(self.latents),
        }


def read_captions(folder: str | Path) -> list[tuple[str, str]]:
    """Paths and captions of the training pictures.

    Raises:
        DatasetError: the file or a line cannot be used, or pictures are missing.
    """
    path = Path(folder) / CAPTIONS
    items = []
    for line, record in read_json_lines(path):
        if isinstance(record, str):
            raise DatasetError(f"{path}, line {line + 1}: {record}")
        image, caption = record.get("image"), record.get("caption")
        if not isinstance(image, str) or not isinstance(caption, str) or not image:
            raise DatasetError(f'{path}, line {line + 1}, is not of the form {{"image": "...", "caption": "..."}}')
        if Path(image).is_absolute() or ".." in Path(image).parts or "\0" in image:
            raise DatasetError(f"{path}, line {line + 1}: the picture {image!r} is not a path inside {folder}")
        items.append((str(Path(folder) / image), caption))
    if not items:
        raise DatasetError(f"{path} holds no pictures")
    check_images_exist((image for image, _ in items), str(folder), flag="--data")
    return items


def add_lora(method: Denoising, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Freeze the pipeline and add a LoRA to the denoiser's attention; returns its parameters by name, in float32.

    Its scale is 1 (alpha = rank), so that a file without a stored alpha means the same to every reader.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    for part in method.pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method.denoiser.add_adapter(settings)  # type: ignore[operator]
    cast_training_params(method.denoiser, dtype=torch.float32)
    return {name: value for name, value in method.denoiser.named_parameters() if value.requires_grad}


def save_lora(method: Denoising, out: Path) -> None:
    """Write the LoRA in diffusers' format, whole or not at all."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(method.denoiser))
    with atomic_path(out / WEIGHTS) as temporary, quiet_libraries():
        given = {f"{method.part}_lora_layers": layers, "weight_name": temporary.name}
        type(method.pipeline).save_lora_weights(temporary.parent, **given)
