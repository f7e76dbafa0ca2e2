"""DiaNA's training, both stages, from the flags to the finished model.

`train` builds tokenizer, data, model and trainer, and runs it. The loop is transformers' (its flags are promised);
`DianaTrainer` says what is DiaNA's own in it: the batches, the parameter groups, the schedule, the loss of a step, the
log line and the files of a model. `StopAndSave` makes checkpoints whole or absent and ends a run that was asked to stop.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.training_args import OptimizerNames

from diana.checkpoints import (
    ARGUMENTS_NAME,
    LOG_NAME,
    UNFINISHED,
    delete,
    earlier_results,
    install_checkpoint,
)
from diana.data.batches import TrainingBatches, TrainingLoader
from diana.data.training import Collate, TrainingDataset, build_training_dataset
from diana.optim import decay_parameter_names, layer_decay_groups
from diana.options import TrainOptions
from diana.preflight import check_data
from diana.schedule import WarmupDecay, follow_deepspeed_file
from diana.starting_point import build_model, checkpoint_to_go_on_from, size_sentences, use_checkpointing
from diana.tokenizer import check_vocabulary, load_tokenizer
from diana.trainer_flags import read_trainer_flags, unusable_flag
from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.images import check_images_exist
from tbps_common.run.batches import ReplacedItems, SeededItems, freeze_memory, replaced_items, usable_workers
from tbps_common.run.device import device_sentence
from tbps_common.run.distributed import Ranks, barrier, broadcast_object
from tbps_common.run.stop import AgreedStop, FiniteLoss, Interruption

# What DiaNA needs where the trainer's own default is another; the flags of the command line come after these.
TRAINER_DEFAULTS = (
    # Every trained parameter takes part in every step, so that DDP need not look for others.
    *("--ddp_find_unused_parameters", "False"),
    # It would look at the loss of every step; `FiniteLoss` ends a run whose loss is not finite without waiting for the GPU.
    *("--logging_nan_inf_filter", "False"),
    *("--remove_unused_columns", "False"),
    *("--report_to", "none"),
)
LOSS_COMPONENTS = ("loss_itc", "loss_sdm", "loss_refine", "logit_scale")


def train(options: TrainOptions, words: list[str]) -> int:
    """Train as the flags say.

    Args:
        options: flags of DiaNA, checked by `diana.preflight`.
        words: the flags left over, for `transformers.TrainingArguments`.

    Returns:
        Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) when the run was asked to stop and has saved its state.

    Raises:
        InputError: flags, data or weights cannot be used.
        FloatingPointError: the loss is no longer finite.
    """
    ranks = Ranks.from_environment()
    say = print if ranks.is_main else _silent
    cpu = options.device == "cpu" or not torch.cuda.is_available()
    words, deepspeed, partitioned = follow_deepspeed_file(words, ranks, cpu=cpu)
    words = [*TRAINER_DEFAULTS, "--disable_tqdm", str(not sys.stderr.isatty()), *words]
    args = read_trainer_flags(words, cpu=cpu)
    if args.fsdp and not ranks.distributed:
        raise InputError("--fsdp shards the model over several processes, and this is the only one: leave it out")
    if args.optim == OptimizerNames.ADAMW_TORCH and not cpu and not partitioned:
        args.optim = OptimizerNames.ADAMW_TORCH_FUSED  # the same step in one kernel
    if deepspeed.clipping is not None:
        args.max_grad_norm = deepspeed.clipping
    output_dir = Path(str(args.output_dir))
    with _leaving_the_process_group(), Interruption() as interruption:
        # Reading the device joins the process group.
        how = "DeepSpeed" if partitioned else f"{ranks.world_size} process(es)"
        say(device_sentence(options.device, args.device, how))
        found = checkpoint_to_go_on_from(options, args) if ranks.is_main else (None, [])
        checkpoint, damaged = broadcast_object(found)
        if checkpoint is not None:
            say(f"resuming from {checkpoint}")

        # What is trained, on what.
        set_seed(args.seed)
        tokenizer_source = checkpoint or options.llama_pretrained or options.pretrained
        assert tokenizer_source is not None  # diana.preflight
        tokenizer: Any = load_tokenizer(tokenizer_source)
        meta = check_data(options)
        dataset = build_training_dataset(
            meta,
            tokenizer,
            dataset_name=options.dataset_name,
            split=options.split,
            image_size=options.image_size,
            max_seq_length=options.max_seq_length,
            mask_probability=options.mask_probability,
            enable_random_turn=options.enable_random_turn,
            pad_to_max_length=options.pad_to_max_length and not options.length_grouping,
            turn_limit=options.turn_limit,
            caption_budget=options.caption_budget,
        )
        check_images_exist(dataset.paths, meta["image_root"], flag="DIANA_DATA_ROOT")
        say(f"There are {dataset.num_images} images.")
        say(f"There are {dataset.num_ids} ids.")
        say(f"There are {dataset.num_captions} captions.")
        model = build_model(options, checkpoint, tokenizer.pad_token_id, scalars=not partitioned)
        check_vocabulary(tokenizer, model.llama_tower.config.vocab_size, tokenizer_source)
        model.set_gradient_checkpointing(use_checkpointing(options.grad_checkpointing, args.device))
        for sentence in size_sentences(model):
            say(sentence)
        if not args.do_train:
            say("nothing to do without --do_train True")
            return 0

        # The run's folder. The trainer itself writes to a folder of unfinished things in it.
        unfinished = output_dir / UNFINISHED
        replaced_results = earlier_results(output_dir) if checkpoint is None else damaged
        if ranks.is_main:
            delete([unfinished])
            output_dir.mkdir(parents=True, exist_ok=True)
            trainer_flags = json.loads(args.to_json_string())
            write_json(
                output_dir / ARGUMENTS_NAME, {"diana": dict(sorted(vars(options).items())), "trainer": trainer_flags}
            )
            if checkpoint is None:
                (output_dir / LOG_NAME).unlink(missing_ok=True)
        keep, args.save_total_limit = args.save_total_limit, None
        args.output_dir = str(unfinished)

        stop_and_save = StopAndSave(
            AgreedStop(interruption, ranks, args.ddp_timeout / 60), output_dir, keep, replaced_results
        )
        callbacks: list[TrainerCallback] = [stop_and_save]
        replaced_images = replaced_items(options.bad_images, len(dataset))
        if replaced_images is not None:
            callbacks.append(ReportReplacedImages(replaced_images, dataset.paths, say))
        try:
            trainer = DianaTrainer(
                model,
                args,
                dataset,
                tokenizer,
                options,
                schedule=deepspeed.schedule,
                log_file=output_dir / LOG_NAME if ranks.is_main else None,
                replaced_images=replaced_images,
                callbacks=callbacks,
            )
        except (ValueError, ImportError) as error:
            raise unusable_flag(error) from error
        if options.seed_per_rank:
            set_seed(args.seed + ranks.rank)
        model.set_attention(options.attn_implementation, torch.bfloat16 if args.bf16 else None)

        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop_and_save.stopped:
            say(f"stopped; resume with --resume_from_checkpoint True (the state is in {output_dir})")
        else:
            trainer.save_finished(output_dir, model.config.checkpoint_dtype)
            say("***** train metrics *****")
            for name, value in sorted({**result.metrics, "train_samples": len(dataset)}.items()):
                say(f"  {name:<24} = {value:.4f}" if isinstance(value, float) else f"  {name:<24} = {value}")
            say(f"the model is in {output_dir}")
        barrier()
        if ranks.is_main:
            delete([unfinished])
        return interruption.exit_status if stop_and_save.stopped else 0


class DianaTrainer(Trainer):
    """transformers' Trainer with what is DiaNA's own.

    Args:
        model: `diana.DiaNAModel`.
        args: flags of the trainer; `output_dir` is where unfinished checkpoints are written.
        dataset: training items.
        tokenizer: saved beside the weights.
        options: flags of DiaNA.
        schedule: DeepSpeed's, computed here; `None` follows `args.lr_scheduler_type`.
        log_file: JSON lines of the log; `None` where another process writes it.
        replaced_images: passes over samples whose image cannot be read; `None` does not.
        callbacks: besides those of transformers.
    """

    # The loss is the mean over the batch; the trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        dataset: TrainingDataset,
        tokenizer: Any,
        options: TrainOptions,
        *,
        schedule: WarmupDecay | None,
        log_file: Path | None,
        replaced_images: ReplacedItems | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        config: Any = model.config
        before = vars(config).get("use_cache")
        collate: Any = Collate(tokenizer.pad_token_id)
        super().__init__(model=model, args=args, data_collator=collate, train_dataset=dataset, callbacks=callbacks)
        # Trainer notes `use_cache` in the config of any model; it would be written to config.json.
        vars(config).pop("use_cache", None)
        if before is not None:
            config.use_cache = before
        # Lines of the log are printed by `log` alone.
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(BarWithoutLogLines)
        self._dataset, self._tokenizer, self._options = dataset, tokenizer, options
        self._schedule, self._log_file, self._replaced_images = schedule, log_file, replaced_images
        self._last_outputs: Any = None
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True  # gradients lie where they are exchanged
        self._finite = FiniteLoss(args.device, self._not_finite)
        self._tokens = torch.zeros(2, dtype=torch.int64, device=args.device)  # real ones, and with padding
        self._logged_at = time.monotonic()

    def get_train_dataloader(self) -> DataLoader:
        """Batches that depend on (seed, epoch, step) alone, not on workers, restarts or the number of processes."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        batches = TrainingBatches(
            len(self._dataset),
            args.per_device_train_batch_size,
            seed=seed,
            rank=args.process_index,
            world_size=args.world_size,
            drop_last=args.dataloader_drop_last,
            lengths=self._dataset.text_lengths if self._options.length_grouping else None,
        )
        workers = usable_workers(args.dataloader_num_workers)
        freeze_memory()
        return TrainingLoader(
            SeededItems(self._dataset, self._replaced_images),
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
        """Two groups (with and without decay), or, with `--use_custom_trainer`, one per layer."""
        if self.optimizer is None and self._options.use_custom_trainer:
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
            optimizer, keywords = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer(groups, **keywords)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """DeepSpeed's WarmupDecayLR where its file is given but not DeepSpeed, else the schedule of the flags."""
        if self._schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        factor = self._schedule.factor(num_training_steps, warmup, self.args.learning_rate)
        target = optimizer if optimizer is not None else self.optimizer
        assert target is not None
        self.lr_scheduler = LambdaLR(target, factor)
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The trainer's, on a batch that was moved without waiting for the GPU."""
        inputs = {name: value.to(self.args.device, non_blocking=True) for name, value in inputs.items()}
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one batch, which `Trainer.training_step` propagates backward; its parts are kept for the log line."""
        outputs = model(**inputs)
        self._last_outputs = outputs
        self._finite.update(outputs.loss.detach(), self.state.global_step + 1)
        mask = inputs["attention_mask"]
        self._tokens += torch.stack([mask.sum(), torch.full_like(mask.sum(), mask.numel())])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _not_finite(self, step: int) -> str:
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else float("nan")
        return (
            f"the loss has not been a finite number since step {step} (learning rate now {rate:.2e}), so nothing is saved; "
            "resume from the last checkpoint with a lower --learning_rate"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Print one line per `--logging_steps`, in the released order of keys, and append it to the JSON lines."""
        self._finite.require()
        super().log(logs, start_time)
        if "loss" not in logs or self._last_outputs is None or not self.is_world_process_zero():
            return
        line: dict[str, Any] = {
            "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
            "epoch": round(self.state.epoch or 0.0, 2),
            "step": self.state.global_step,
            "loss": round(logs["loss"], 4),
        }
        for name in LOSS_COMPONENTS:
            value = getattr(self._last_outputs, name)
            if value is not None:
                line[name] = round(float(value.detach()), 4)
        line["grad_norm"] = logs.get("grad_norm")
        line["learning_rate"] = logs.get("learning_rate")
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
        """The model of a checkpoint, in float32; every process must call it."""
        self._finite.require()
        folder = Path(output_dir or str(self.args.output_dir))
        self._save_model_folder(folder, dtype=None)
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")

    def save_finished(self, output_dir: Path, dtype: torch.dtype | None) -> None:
        """The finished model, in the dtype of its configuration; every process must call it."""
        self._save_model_folder(output_dir, dtype)

    def _save_model_folder(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Weights, config.json and tokenizer in the released layout, which `diana.load_diana` reads."""
        state: Any = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            state["logit_scale"] = state["logit_scale"].reshape(())
            folder.mkdir(parents=True, exist_ok=True)
            self._tokenizer.save_pretrained(str(folder))
            model: Any = self.model
            model.save_pretrained(folder, state_dict=state, dtype=dtype)


class BarWithoutLogLines(ProgressCallback):
    """The trainer's progress bar alone: log lines are printed by `DianaTrainer.log`."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class StopAndSave(TrainerCallback):
    """Moves every checkpoint to its place when all of it is on the disk, and ends a run that was asked to stop.

    Args:
        stop_requested: whether any process was asked to stop.
        output_dir: of the run.
        keep: how many checkpoints stay; `None`: all.
        replaced_results: what an earlier run left; deleted as soon as a checkpoint of this one is in place.
    """

    def __init__(
        self, stop_requested: AgreedStop, output_dir: Path, keep: int | None, replaced_results: list[Path]
    ) -> None:
        self._stop_requested, self._output_dir, self._keep = stop_requested, output_dir, keep
        self._replaced_results = replaced_results
        self._saved_at = -1
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # The mean of the logged loss begins anew after a save, so that a resumed run logs the same means.
        control.should_log |= control.should_save
        if self._stop_requested():
            self.stopped = control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save &= state.global_step != self._saved_at
        control.should_log |= control.should_save
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        barrier()  # every process has written its part
        self._saved_at = state.global_step
        if state.is_world_process_zero:
            written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            install_checkpoint(written, self._output_dir, replaced=self._replaced_results, keep=self._keep)
            self._replaced_results = []
        barrier()
        return control


class ReportReplacedImages(TrainerCallback):
    """Says, at the end of an epoch and of the training, which images could not be read.

    Args:
        replaced: keeps count.
        paths: image of every sample.
        say: shows a sentence.
    """

    def __init__(self, replaced: ReplacedItems, paths: Sequence[str], say: Callable[[str], None]) -> None:
        self._replaced, self._paths, self._say = replaced, paths, say

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        sentence = self._replaced.report(self._paths.__getitem__)
        if sentence is not None:
            self._say(f"warning: {sentence}")

    on_train_end = on_epoch_end


@contextlib.contextmanager
def _leaving_the_process_group() -> Iterator[None]:
    failed = True
    try:
        yield
        failed = False
    finally:
        # After a failure under NCCL the others may sit in a collective that never ends; the launcher ends them when this
        # process is gone.
        if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _silent(*words: Any, **options: Any) -> None:
    """What `say` is on the processes that do not talk to the user."""
