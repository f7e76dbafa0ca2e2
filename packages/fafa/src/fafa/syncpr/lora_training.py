"""The training of a LoRA: every number depends on the seed, the step and the item, so that a resumed run is exact."""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fafa.syncpr.denoising import LORA_TARGETS, Denoising, denoising_of
from fafa.syncpr.libraries import quiet_libraries
from fafa.syncpr.lora import WEIGHTS, settings_of
from fafa.syncpr.text_to_image import choose_dtype, load_pipeline
from tbps_common.errors import CheckpointError, InputError
from tbps_common.files import atomic_path
from tbps_common.images import read_image
from tbps_common.pipeline import Journal
from tbps_common.pipeline.stages import begin_manifest, finish_manifest
from tbps_common.run.batches import EpochBatches, SeededItems, replaced_items
from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint
from tbps_common.run.device import choose_device, device_sentence
from tbps_common.run.distributed import Ranks, barrier, process_group
from tbps_common.run.progress import Progress
from tbps_common.run.stop import AgreedStop, FiniteLoss, Interruption

_STATE = "training_state.pt"
_LARGEST_GRADIENT = 1.0


class CaptionedPictures(Dataset[dict[str, Any]]):
    """Pictures with everything random that a step needs of them: noise, time, and whether the caption is left out.

    `SeededItems` seeds the generators of an item, so these draws depend on (seed, epoch, index) alone.
    """

    def __init__(self, items: list[tuple[str, str]], size: tuple[int, int], latents: tuple[int, int, int], drop: float):
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


def train(flags: argparse.Namespace, items: list[tuple[str, str]]) -> int:
    """Train to `flags.steps`, from the last saved state if there is one; returns the exit status."""
    device = choose_device(flags.device, Ranks.from_environment().local_rank)
    with process_group(device) as ranks, Interruption() as interruption:
        run = _Run(flags, items, device, ranks)
        stop = AgreedStop(interruption, ranks)
        done = run.train(stop)
    return 0 if done else interruption.exit_status


class _Run:
    """Model, optimizer and place in the data of one process."""

    def __init__(self, flags: argparse.Namespace, items: list[tuple[str, str]], device: torch.device, ranks: Ranks):
        self.flags, self.device, self.ranks = flags, device, ranks
        self.out = Path(flags.out)
        self.dtype = choose_dtype(flags.dtype, device)
        self.batches = EpochBatches(
            len(items), flags.batch_size, seed=flags.seed, rank=ranks.rank, world_size=ranks.world_size
        )
        self._say(device_sentence(flags.device, device, str(self.dtype).removeprefix("torch.")))
        pipeline = load_pipeline(flags.model, flags.revision, self.dtype)
        self.method = denoising_of(pipeline)
        self.parameters = add_lora(self.method, flags.rank, flags.seed)
        pipeline.to(device)
        if flags.gradient_checkpointing:
            self.method.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=flags.learning_rate, weight_decay=1e-2)
        self.data = CaptionedPictures(
            items,
            (flags.height, flags.width),
            self.method.latent_size(flags.height, flags.width),
            flags.caption_dropout,
        )
        self._replaced = replaced_items(flags.bad_images, len(items))
        if ranks.is_main:
            begin_manifest(
                self.out / WEIGHTS, settings_of(flags, items, ranks.world_size), {"command": "fafa-syncpr lora"}
            )
        barrier()
        self.step = self._resume()
        self._counted = time.perf_counter()

    def train(self, stop: Any) -> bool:
        """Whether all steps are done."""
        flags = self.flags
        if self.step >= flags.steps:
            self._save()  # the manifest was begun anew
            self._say(f"all {flags.steps} steps are done already: {self.out / WEIGHTS}")
            return True
        finite = FiniteLoss(self.device)
        losses = torch.zeros((), device=self.device)
        with (
            Journal(self.out / "log.jsonl") if self.ranks.is_main else nullcontext() as log,
            Progress(flags.steps, initial=self.step, unit="step", enabled=self.ranks.is_main) as progress,
        ):
            if log is not None:
                log.rewrite([line for line in log.records if line["step"] <= self.step])
            since = self.step
            for batch in self._loader():
                loss = self._train_step(batch)
                self.step += 1
                progress.update()
                losses += loss
                finite.update(loss, self.step)
                last = self.step == flags.steps
                stopping = stop()
                if self.step % flags.log_every == 0 or last or stopping:
                    self._require_finite(finite)
                    mean = float(losses) / (self.step - since)
                    losses.zero_()
                    since = self.step
                    progress.update(0, loss=f"{mean:.4f}")
                    if log is not None:
                        log.append({"step": self.step, "loss": mean, "lr": self._rate(self.step - 1)})
                if self.step % flags.save_every == 0 or last or stopping:
                    self._require_finite(finite)
                    self._save()
                if last or stopping:
                    return last
        raise AssertionError("the loader ends with the last step")

    def _train_step(self, batch: dict[str, Any]) -> Tensor:
        """One optimizer step; returns this process's loss, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        method = self.method
        move = {name: value.to(self.device) for name, value in batch.items() if isinstance(value, Tensor)}
        latents = method.latents(move["pixels"], move["posterior_noise"])
        texts = method.encode(batch["caption"])
        cast = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()
        with cast:
            loss = method.loss(latents, texts, move["noise"].to(latents.dtype), move["uniform"])
        loss.backward()
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _average_gradients(self) -> None:
        """Mean over the processes, in one message: a LoRA is small."""
        if not self.ranks.distributed:
            return
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.ranks.world_size
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))

    def _rate(self, step: int) -> float:
        return self.flags.learning_rate * min(1.0, (step + 1) / max(self.flags.warmup, 1))

    def _loader(self) -> Any:
        """Batches from the present step on, without an end."""
        epoch, first = divmod(self.step, self.batches.batches_per_epoch)
        while True:
            self.batches.set_position(epoch, first)
            items = SeededItems(self.data, self._replaced)
            yield from DataLoader(items, batch_sampler=self.batches, num_workers=self.flags.num_workers)
            epoch, first = epoch + 1, 0

    def _require_finite(self, finite: FiniteLoss) -> None:
        bad = finite.first_bad_iteration()
        if bad:
            raise InputError(
                f"the loss of step {bad} is not finite: lower --learning-rate, or use --dtype bfloat16 or float32; the "
                f"last good state is in {self.out}"
            )

    def _save(self) -> None:
        if self._replaced is not None and (sentence := self._replaced.report(lambda index: self.data.items[index][0])):
            self._say(f"warning: {sentence}")
        if self.ranks.is_main:
            weights = {name: value.detach().cpu() for name, value in self.parameters.items()}
            state = {"step": self.step, "weights": weights, "optimizer": self.optimizer.state_dict()}
            # In this order: where there is a state, the file is as new and its manifest binds the next run.
            save_lora(self.method, self.out)
            save_checkpoint(state, self.out / _STATE)
            finish_manifest(
                self.out / WEIGHTS,
                finished=self.step >= self.flags.steps,
                items=max(self.flags.steps, self.step),
                kept=self.step,
                dropped={},
                seconds=time.perf_counter() - self._counted,
            )
            self._counted = time.perf_counter()
        barrier()

    def _resume(self) -> int:
        path = self.out / _STATE
        if not path.exists():
            return 0
        state = load_checkpoint_file(path)
        try:
            if set(state["weights"]) != set(self.parameters):
                raise KeyError("weights")
            with torch.no_grad():
                for name, value in state["weights"].items():
                    self.parameters[name].copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            step = int(state["step"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a state of this training; delete it to begin anew") from error
        self._say(f"going on after step {step}")
        return step

    def _say(self, sentence: str) -> None:
        if self.ranks.is_main:
            print(sentence, flush=True)


def add_lora(method: Denoising, rank: int, seed: int) -> dict[str, torch.nn.Parameter]:
    """Freeze the pipeline and add a LoRA to the denoiser's attention; returns its parameters by name, in float32.

    Its scale is 1 (alpha = rank), so that a file without a stored alpha means the same to every reader.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    for part in method.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
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
