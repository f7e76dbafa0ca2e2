"""The stock `transformers.Trainer`, with DiaNA's batches, groups, schedule, log line and files."""

import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from diana.optim import decay_parameter_names, layer_decay_groups
from diana.schedule import warmup_decay_gamma
from diana.training.batches import TrainingBatches, TrainingLoader
from diana.training.deepspeed_file import WarmupDecay
from tbps_common.run.batches import ReplacedItems, SeededItems
from tbps_common.run.stop import FiniteLoss

COMPONENTS = ("loss_itc", "loss_sdm", "loss_refine", "logit_scale")


class DianaTrainer(Trainer):
    """Trainer of DiaNA.

    Args:
        model: `diana.DiaNAModel`.
        args: flags of the trainer; `output_dir` is where unfinished checkpoints are written.
        dataset: map-style data set of `diana.data`.
        collate: joins its items.
        tokenizer: saved beside the weights.
        schedule: DeepSpeed's schedule, computed here; `None` follows `args.lr_scheduler_type`.
        layer_wise: learning rates by layer, from VIT_LAYER_DECAY_RATE and llama_LAYER_DECAY_RATE.
        text_lengths: of the samples, to join similar ones in a batch; `None` does not.
        log_file: JSON lines of the log.
        replaced: passes over samples whose image cannot be read; `None` does not.
        callbacks: beside the stock ones.
    """

    # The loss is the mean over the batch; the trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        dataset: Any,
        collate: Any,
        tokenizer: Any,
        schedule: WarmupDecay | None,
        layer_wise: bool,
        text_lengths: list[int] | None,
        log_file: Path | None,
        replaced: ReplacedItems | None,
        callbacks: list[Any],
    ) -> None:
        config: Any = model.config
        before = vars(config).get("use_cache")
        super().__init__(model=model, args=args, data_collator=collate, train_dataset=dataset, callbacks=callbacks)
        # Trainer notes `use_cache` in the config of any model; it would be written to config.json.
        vars(config).pop("use_cache", None)
        if before is not None:
            config.use_cache = before
        self.tokenizer_to_save = tokenizer
        self._schedule = schedule
        self._layer_wise = layer_wise
        self._text_lengths = text_lengths
        self._log_file = log_file
        self._replaced = replaced
        self._outputs: Any = None
        self._finite = FiniteLoss(args.device)
        self._tokens = torch.zeros(2, dtype=torch.int64, device=args.device)  # real ones, with padding
        self._logged_at = time.monotonic()

    def get_train_dataloader(self) -> DataLoader:
        """Batches that depend on (seed, epoch, step) alone, not on workers, restarts or the number of processes."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        batches = TrainingBatches(
            len(self.train_dataset),  # type: ignore[arg-type]
            args.per_device_train_batch_size,
            seed=seed,
            rank=args.process_index,
            world_size=args.world_size,
            drop_last=args.dataloader_drop_last,
            lengths=self._text_lengths,
        )
        workers = args.dataloader_num_workers
        return TrainingLoader(
            SeededItems(self.train_dataset, self._replaced),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            # A generator of its own: starting an epoch draws nothing from the one that drop path uses.
            generator=torch.Generator().manual_seed(seed),
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with weight decay: neither norm nor bias."""
        return sorted(decay_parameter_names(model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Two groups (with and without decay), or one per layer."""
        if self.optimizer is None and self._layer_wise:
            module: Any = self.model if model is None else model
            groups = layer_decay_groups(
                module,
                self.args.learning_rate,
                self.args.weight_decay,
                vit_rate=float(os.environ.get("VIT_LAYER_DECAY_RATE", "1.0")),
                llama_rate=float(os.environ.get("llama_LAYER_DECAY_RATE", "1.0")),
            )
            # `param_names` is a key of torch's own in a group.
            groups = [{name: value for name, value in group.items() if name != "param_names"} for group in groups]
            # The released trainer hands the base rate to the optimizer and scales it by layer.
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """DeepSpeed's WarmupDecayLR where its file is given but not DeepSpeed, else the schedule of the flags."""
        if self._schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = self._schedule
        warmup = self.args.get_warmup_steps(num_training_steps)
        warmup = warmup if schedule.warmup_steps is None else schedule.warmup_steps
        total = num_training_steps if schedule.total_steps is None else schedule.total_steps
        factor = 1.0 if schedule.max_lr is None else schedule.max_lr / self.args.learning_rate
        target = optimizer if optimizer is not None else self.optimizer
        assert target is not None

        def gamma(steps_done: int) -> float:
            # The first step has the minimum learning rate; step k >= 2 has that of the schedule's counter k - 2.
            if steps_done == 0:
                return 0.0
            return factor * warmup_decay_gamma(steps_done - 1, total, warmup, schedule.warmup_type)

        self.lr_scheduler = LambdaLR(target, gamma)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss; its components are kept for the log line."""
        outputs = model(**inputs)
        self._outputs = outputs
        self._finite.update(outputs.loss.detach(), self.state.global_step + 1)
        mask = inputs["attention_mask"]
        self._tokens += torch.stack([mask.sum(), torch.full_like(mask.sum(), mask.numel())])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Print one line per `--logging_steps`, in the released order of keys, and append it to the JSON lines."""
        self._check_finite()
        super().log(logs, start_time)
        if "loss" not in logs or self._outputs is None or not self.is_world_process_zero():
            return
        line: dict[str, Any] = {
            "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
            "epoch": round(self.state.epoch or 0.0, 2),
            "step": self.state.global_step,
            "loss": round(logs["loss"], 4),
        }
        for name in COMPONENTS:
            value = getattr(self._outputs, name)
            if value is not None:
                line[name] = round(float(value.detach()), 4)
        line["grad_norm"] = logs.get("grad_norm")
        line["learning_rate"] = logs.get("learning_rate")
        from tqdm import tqdm

        tqdm.write(str(line))
        if self._log_file is not None:
            real, padded = self._tokens.tolist()
            self._tokens.zero_()
            now = time.monotonic()
            speed = {
                "tokens_per_second": round(real / max(now - self._logged_at, 1e-9), 1),
                "padding": round(1 - real / max(padded, 1), 4),
            }
            self._logged_at = now
            with open(self._log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, **speed}) + "\n")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights, config.json and tokenizer in the released layout; every process must call it."""
        self._check_finite()
        state: Any = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            self.write_model(Path(output_dir or str(self.args.output_dir)), state, dtype=None)
            torch.save(self.args, Path(output_dir or str(self.args.output_dir)) / "training_args.bin")

    def save_final(self, output_dir: Path, dtype: torch.dtype | None) -> None:
        """The finished model, in the dtype of its configuration; every process must call it."""
        state: Any = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            self.write_model(output_dir, state, dtype)

    def write_model(self, folder: Path, state: dict[str, Tensor], dtype: torch.dtype | None) -> None:
        """Write one folder that `diana.load_diana` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer_to_save.save_pretrained(str(folder))
        model: Any = self.model
        model.save_pretrained(folder, state_dict=state, dtype=dtype)

    def _check_finite(self) -> None:
        bad = self._finite.first_bad_iteration()
        if bad:
            rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else float("nan")
            raise FloatingPointError(
                f"the loss is no longer a finite number since step {bad} (learning rate now {rate:.2e}), so nothing is "
                "saved; go on from the last checkpoint with a lower --learning_rate"
            )
