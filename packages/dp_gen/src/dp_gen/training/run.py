"""A training run, from its flags to its output folder: new or resumed, in one process or in several."""

import argparse
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dp_gen.captions import load_tokenizer
from dp_gen.data import DiversePersonDataset, collate_fn
from dp_gen.model import DiversePersonModel, DiversePersonPipeline, load_checkpoint
from dp_gen.model.capture import checkpoint_gradients, recomputation_contexts
from dp_gen.model.parts import load_generation_scheduler, load_training_scheduler
from dp_gen.model.pipeline import settings_of
from dp_gen.training import checkpoints
from dp_gen.training.checkpoints import Progress
from dp_gen.training.optimizer import build_lr_scheduler, build_optimizer, set_trainable
from dp_gen.training.progress_log import ProgressLog
from tbps_common.errors import CheckpointError
from tbps_common.files import write_json
from tbps_common.run.batches import EpochBatches, SeededItems, item_seed, replaced_items
from tbps_common.run.checkpoint import load_checkpoint_file
from tbps_common.run.distributed import Ranks, broadcast_object
from tbps_common.run.logs import RunLog
from tbps_common.run.randomness import seed_worker
from tbps_common.run.stop import AgreedStop, FiniteLoss, Interruption

PROJECT = "DiversePerson"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

logger = logging.getLogger(__name__)


class TrainingRun:
    """One run. Building it loads data, model and, to resume, the checkpoint; `train` does the rest.

    Nothing is written before everything has been loaded.

    Args:
        args: flags of `parse_args`, checked by `check_training_flags`; `lr` and `max_train_steps` are filled in.
        accelerator: accelerate's `Accelerator`.
        log: log lines, written to the output folder as soon as there is one.

    Raises:
        InputError: data, models or checkpoint cannot be used.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Any, log: RunLog):
        self.args, self.accelerator = args, accelerator
        self.ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.local_process_index)
        self.settings = settings_of(argparse.Namespace(**vars(args)))
        self.output_dir = Path(args.output_dir)
        self.interruption = Interruption()
        self._stop_requested = AgreedStop(self.interruption, self.ranks)
        # Files may appear while the processes start: the main process decides for all.
        source = broadcast_object(checkpoints.find_checkpoint(args) if self.ranks.is_main else None)
        seed = broadcast_object(self._seed(source) if self.ranks.is_main else 0)
        self._seed_all(seed)

        self.noise_scheduler = load_training_scheduler(args)
        self.tokenizer = load_tokenizer(args.pretrained_model_hf, args.revision, cache_dir=args.cache_dir)
        self.model = self._build_model()
        self.loader, self.batches = self._build_loader(seed)
        self._fill_in_flags()
        optimizer = build_optimizer(self.model, args)
        scheduler = build_lr_scheduler(optimizer, args)
        self.network, self.optimizer, self.scheduler = accelerator.prepare(self.model, optimizer, scheduler)
        accelerator.register_save_state_pre_hook(self._save_weights)
        if self.ranks.rank and not args.same_noise_on_ranks:
            torch.manual_seed(item_seed(seed, 0, self.ranks.rank))  # noise of its own for every process
        self.progress = self._resume(source) if source else Progress()
        self.progress.seed, self.progress.samples_per_batch = seed, self._samples_per_batch
        self._finite = FiniteLoss(accelerator.device)
        self._open(log, source)

    def train(self) -> int:
        """Train all remaining updates and write the generation pipeline.

        Returns:
            Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) when the run was asked to stop and has saved its state.

        Raises:
            FloatingPointError: the loss is no longer a finite number.
        """
        from tqdm import tqdm

        log = ProgressLog(self.accelerator)
        # disable=None: no bar where stderr is not a terminal.
        disable = None if self.ranks.is_main else True
        with ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(total=self.args.max_train_steps, initial=self.progress.step, unit="update", disable=disable)
            )
            stack.enter_context(self.interruption)
            stack.enter_context(self._attention_kernels())
            self.network.train()
            for batches in self._updates():
                self._update(batches, log)
                bar.update()
                bar.set_description(f"Global step: {self.progress.step}", refresh=False)
                if len(log) >= self.args.log_every:
                    self._flush(log, bar)
                stop = self._stop_requested()
                if stop or self.progress.step % self.args.checkpointing_steps == 0:
                    self._save(log, bar)
                if stop:
                    return self._stopped()
            if self.interruption.requested:  # the loader's processes ended before an update was done
                self._save(log, bar)
                return self._stopped()
            self._flush(log, bar)
        self._report_replaced()
        self._conclude()
        return 0

    def _updates(self) -> Iterator[list[Mapping[str, Tensor]]]:
        """The batches of each update, on this process's device; counts them in `progress`."""
        progress, accumulation = self.progress, self.args.gradient_accumulation_steps
        while progress.step < self.args.max_train_steps:
            if progress.batch >= self.batches.batches_per_epoch:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            self.batches.set_position(progress.epoch, progress.batch)
            gathered: list[Mapping[str, Tensor]] = []
            used = progress.batch
            for batch in self._load():
                gathered.append(batch)
                used += 1
                if len(gathered) == accumulation or used == self.batches.batches_per_epoch:
                    progress.step, progress.batch = progress.step + 1, used
                    yield gathered
                    gathered = []
                    if progress.step >= self.args.max_train_steps:
                        return
            if self.interruption.requested:
                return

    def _load(self) -> Iterator[Mapping[str, Tensor]]:
        device = self.accelerator.device
        try:
            for batch in self.loader:
                yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        except RuntimeError:
            # A SIGTERM to the whole process group also ends the loader's processes. What was trained can be saved.
            if not self.interruption.requested or self.ranks.distributed:
                raise

    def _update(self, batches: list[Mapping[str, Tensor]], log: ProgressLog) -> None:
        """One optimizer update from one or more batches."""
        accelerator, sums = self.accelerator, {}
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else accelerator.no_sync(self.network):
                losses = self.network(batch, self.noise_scheduler)
                accelerator.backward(losses["loss"] / self.args.gradient_accumulation_steps)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / len(batches)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        # With a gradient scaler an overflowing norm is part of the method, and the update was left out.
        checked = sums["loss"] if accelerator.scaler is not None else sums["loss"] + norm
        self._finite.update(checked, self.progress.step)
        samples = sum(len(batch["pix_v"]) for batch in batches) * self.ranks.world_size
        log.add(self.progress.step, sums, norm, lr, samples)

    def _flush(self, log: ProgressLog, bar: Any) -> None:
        """Read back the losses since the last time, and show the newest."""
        self._require_finite()
        values = log.flush()
        if not values:
            return
        bar.set_postfix(
            l_noise=values["denoise_loss"], lr=values["lr"], l_loc=values.get("localization_loss", 0.0), refresh=False
        )
        logger.info(
            "step %d/%d: %s",
            self.progress.step,
            self.args.max_train_steps,
            ", ".join(f"{name} {value:.4g}" for name, value in values.items()),
        )

    def _save(self, log: ProgressLog, bar: Any) -> None:
        """Write `checkpoint-<step>`, then delete what need not be kept."""
        self._flush(log, bar)
        self._report_replaced()
        accelerator = self.accelerator
        target = self.output_dir / checkpoints.checkpoint_name(self.progress.step)
        with checkpoints.new_folder(target, is_main=self.ranks.is_main, wait=accelerator.wait_for_everyone) as folder:
            accelerator.save_state(str(folder))
            if self.ranks.is_main:
                write_json(folder / checkpoints.PROGRESS, asdict(self.progress))
        if self.ranks.is_main:
            if self.args.keep_only_last_checkpoint:
                checkpoints.prune(self.output_dir, self.progress.step, self.args.keep_interval)
            logger.info("saved %s", target)

    def _save_weights(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """In place of accelerate's: the weights of the model itself, whether it is wrapped for several processes or not."""
        weights.clear()
        if self.ranks.is_main:
            state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(state, os.path.join(folder, checkpoints.WEIGHTS), metadata={"format": "pt"})

    def _stopped(self) -> int:
        path = self.output_dir / checkpoints.checkpoint_name(self.progress.step)
        logger.info(
            "stopped after update %d; go on with --resume_from_checkpoint latest (%s)", self.progress.step, path
        )
        return self.interruption.exit_status

    def _conclude(self) -> None:
        """Write the generation pipeline."""
        self.accelerator.wait_for_everyone()
        if self.ranks.is_main:
            scheduler = load_generation_scheduler(self.args)
            DiversePersonPipeline(self.model, self.tokenizer, scheduler, self.settings).save_pretrained(self.output_dir)
            logger.info("trained %d updates; the model is in %s", self.progress.step, self.output_dir)
            logger.info("try it with: python generate.py --finetuned_model_path '%s' ...", self.output_dir)
        self.accelerator.wait_for_everyone()

    def _report_replaced(self) -> None:
        if self._replaced is not None and (sentence := self._replaced.report(self._image_path)):
            logger.warning("%s", sentence)

    def _require_finite(self) -> None:
        step = self._finite.first_bad_iteration()
        if step:
            kept = checkpoints.find_checkpoint(
                argparse.Namespace(resume_from_checkpoint="latest", output_dir=self.output_dir)
            )
            last = f"the last good checkpoint is {kept}" if kept else "no checkpoint has been written yet"
            raise FloatingPointError(
                f"the loss or its gradient is not a finite number at update {step} (learning rate {self.args.lr:.2e}); "
                f"{last}; a lower --lr, or --mixed_precision no, usually helps"
            )

    def _seed(self, source: Path | None) -> int:
        if self.args.seed is not None:
            return self.args.seed
        stored = checkpoints.read_progress(source, 1, 1).seed if source else 0
        return stored or int.from_bytes(os.urandom(4), "little")

    def _seed_all(self, seed: int) -> None:
        from accelerate.utils import set_seed

        set_seed(seed)

    def _build_model(self) -> DiversePersonModel:
        args, accelerator = self.args, self.accelerator
        model = DiversePersonModel.from_pretrained(args)
        names = set_trainable(model, args, _DTYPES.get(accelerator.mixed_precision, torch.float32))
        if args.gradient_checkpointing:
            checkpoint_gradients(model.unet, model.capture)
            if args.train_text_encoder:
                encoder = model.text_encoder
                # transformers renamed it; the old name is the only one of the oldest release that this package takes.
                enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
                contexts = partial(recomputation_contexts, accelerator.device)
                enable({"use_reentrant": False, "context_fn": contexts})
        model.to(accelerator.device)
        if accelerator.device.type == "cuda":
            for part in (model.unet, model.vae):
                part.to(memory_format=torch.channels_last)
        if args.compile:
            parts = [model.image_encoder, model.text_encoder, model.vae.encoder]
            for part in parts if model.capture else [*parts, model.unet]:
                part.compile()
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        logger.info("%.1fM parameters are trained, in %d tensors", count / 1e6, len(names))
        return model

    def _build_loader(self, seed: int) -> tuple[Any, EpochBatches]:
        args = self.args
        dataset = DiversePersonDataset(args.dataset_name, self.tokenizer, args, "train")
        self._replaced = replaced_items(args.bad_images, len(dataset))
        self._image_path = lambda index: str(dataset.folder.image_path(dataset.img_ids[index]))
        batches = EpochBatches(
            len(dataset),
            args.train_batch_size,
            seed=seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            drop_last=False,
        )
        loader = torch.utils.data.DataLoader(
            SeededItems(dataset, self._replaced),
            batch_sampler=batches,
            collate_fn=collate_fn,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_num_workers > 0,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=seed_worker,
            generator=torch.Generator(),  # its base seed is not drawn from the numbers for the noise then
        )
        logger.info("%d training samples, %d batches per epoch", len(dataset), batches.batches_per_epoch)
        return loader, batches

    @property
    def _samples_per_batch(self) -> int:
        return self.args.train_batch_size * self.ranks.world_size

    @property
    def _updates_per_epoch(self) -> int:
        return -(-self.batches.batches_per_epoch // self.args.gradient_accumulation_steps)

    def _fill_in_flags(self) -> None:
        args = self.args
        if args.max_train_steps is None:
            args.max_train_steps = args.num_train_epochs * self._updates_per_epoch
        if args.scale_lr:
            args.lr *= args.gradient_accumulation_steps * self._samples_per_batch
        epochs = -(-args.max_train_steps // self._updates_per_epoch)
        logger.info("%d updates of %d in %d epochs", args.max_train_steps, self._samples_per_batch, epochs)

    def _resume(self, source: Path) -> Progress:
        """Restore weights, optimizer, schedule, scaler and random numbers.

        Raises:
            CheckpointError: something in the folder is damaged or of another model.
        """
        progress = checkpoints.read_progress(source, self._updates_per_epoch, self.args.gradient_accumulation_steps)
        load_checkpoint(self.model, source)
        parts = [(checkpoints.OPTIMIZER, self.optimizer), (checkpoints.SCHEDULER, self.scheduler)]
        if self.accelerator.scaler is not None and (source / checkpoints.SCALER).is_file():
            parts.append((checkpoints.SCALER, self.accelerator.scaler))
        for name, part in parts:
            try:
                part.load_state_dict(load_checkpoint_file(source / name))
            except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"{source / name} does not fit these flags ({error}): resume with those of the first start, or "
                    "start anew from its weights with --load_model"
                ) from error
        before = progress.samples_per_batch or self._samples_per_batch
        if before != self._samples_per_batch:
            logger.warning("%s had %d samples per batch, and this run has %d", source, before, self._samples_per_batch)
            progress.batch = progress.batch * before // self._samples_per_batch
        checkpoints.restore_random_state(source, self.ranks.rank)
        logger.info("resuming from %s: update %d, epoch %d", source, progress.step, progress.epoch + 1)
        return progress

    def _open(self, log: RunLog, source: Path | None) -> None:
        """Make the folders, begin the log file and the trackers."""
        if self.ranks.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            Path(self.args.logging_dir).mkdir(parents=True, exist_ok=True)
            checkpoints.remove_partial(self.output_dir)
            log.open(self.output_dir / "train_log.txt", append=source is not None)
            logger.info("flags: %s", ", ".join(f"{name}={value}" for name, value in self.settings["args"].items()))
        self.accelerator.wait_for_everyone()
        flags = {name: value for name, value in self.settings["args"].items() if value is not None}
        # Points that a killed run logged after its last checkpoint are dropped.
        purge = {"tensorboard": {"purge_step": self.progress.step + 1}}
        self.accelerator.init_trackers(PROJECT, config=flags, init_kwargs=purge)

    def _attention_kernels(self) -> AbstractContextManager[Any]:
        if not self.args.disable_flashattention:
            return nullcontext()
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH])
