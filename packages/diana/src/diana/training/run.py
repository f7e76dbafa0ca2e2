"""A training run from its flags to its folder, in one process or in several."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diana.training.checkpoint_folders import (
    ARGUMENTS_NAME,
    LOG_NAME,
    UNFINISHED,
    check_state,
    checkpoint_to_resume,
    delete,
    earlier_results,
    requested_checkpoint,
)
from diana.training.deepspeed_file import DeepSpeedFile, deepspeed_is_installed, read_deepspeed_file
from diana.training.environment import adopt_launcher, use_one_gpu
from diana.training.preflight import check_data, parse_and_check
from diana.training.trainer_flags import read_trainer_flags, take_flag
from tbps_common.errors import CheckpointError
from tbps_common.files import write_json
from tbps_common.images import check_images_exist
from tbps_common.run.stop import AgreedStop, Interruption

if TYPE_CHECKING:
    from tbps_common.run.distributed import Ranks


def train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train as the flags say.

    Args:
        args: flags of `parse_train_flags`, checked by `check_training`.
        rest: the words it left over, for `transformers.TrainingArguments`.

    Returns:
        Exit status: 0, or 130 (Ctrl-C) or 143 (SIGTERM) when the run was asked to stop and has saved its state.

    Raises:
        InputError: flags, data or weights cannot be used.
        FloatingPointError: the loss is no longer finite.
    """
    adopt_launcher()
    from tbps_common.run.distributed import Ranks, broadcast_object

    ranks = Ranks.from_environment()
    if not ranks.distributed:
        use_one_gpu()
    import torch

    cpu = args.device == "cpu" or not torch.cuda.is_available()
    rest, file, use_deepspeed = _choose_deepspeed(list(rest), ranks, cpu=cpu)
    trainer_args = read_trainer_flags(_with_defaults(rest), cpu=cpu)
    if file is not None and file.clipping is not None:
        trainer_args.max_grad_norm = file.clipping
    output_dir = Path(str(trainer_args.output_dir))
    say = print if ranks.is_main else _silent
    # Reading the device joins the process group.
    device = trainer_args.device
    say(_device_sentence(device, ranks, args.device, use_deepspeed=use_deepspeed))
    try:
        checkpoint = broadcast_object(_checkpoint(args, trainer_args, output_dir) if ranks.is_main else None)
        if checkpoint is not None:
            say(f"going on from {checkpoint}")
        with Interruption() as interruption:
            return _train(args, trainer_args, ranks, output_dir, checkpoint, file, interruption, say)
    finally:
        _leave_group()


def _train(
    args: argparse.Namespace,
    trainer_args: Any,
    ranks: "Ranks",
    output_dir: Path,
    checkpoint: Path | None,
    file: DeepSpeedFile | None,
    interruption: Interruption,
    say: Any,
) -> int:
    import torch
    from transformers import set_seed

    from diana.data import Collate, build_training_dataset
    from diana.tokenizer import check_vocabulary, load_tokenizer
    from diana.training.model_setup import build_model, image_size, size_sentences, use_checkpointing

    set_seed(trainer_args.seed)
    tokenizer_source = checkpoint or args.llama_pretrained or args.pretrained
    tokenizer: Any = load_tokenizer(tokenizer_source)
    dataset = build_training_dataset(
        check_data(args),
        tokenizer,
        dataset_name=args.dataset_name,
        split=args.split,
        image_size=image_size(args),
        max_seq_length=args.max_seq_length,
        mask_probability=args.mask_probability,
        enable_random_turn=args.enable_random_turn,
        pad_to_max_length=args.pad_to_max_length and not args.length_grouping,
        turn_limit=args.turn_limit,
        caption_budget=args.caption_budget,
    )
    check_images_exist(dataset.images, check_data(args)["image_root"], flag="DIANA_DATA_ROOT")
    say(f"There are {dataset.num_images} images.")
    say(f"There are {dataset.num_ids} ids.")
    say(f"There are {dataset.num_captions} captions.")
    model = build_model(args, checkpoint, tokenizer.pad_token_id)
    check_vocabulary(tokenizer, model.llama_tower.config.vocab_size, tokenizer_source)
    model.set_gradient_checkpointing(use_checkpointing(args.grad_checkpointing, trainer_args.device))
    for sentence in size_sentences(model):
        say(sentence)
    if not trainer_args.do_train:
        say("nothing to do without --do_train True")
        return 0

    from diana.training.callbacks import ReportReplaced, StopOnSignal, WholeCheckpoints
    from diana.training.trainer import DianaTrainer
    from tbps_common.run.batches import replaced_items

    unfinished = output_dir / UNFINISHED
    replaced = earlier_results(output_dir) if checkpoint is None else []
    if ranks.is_main:
        delete([unfinished])
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_arguments(output_dir, args, trainer_args, append=checkpoint is not None)
    keep, trainer_args.save_total_limit = trainer_args.save_total_limit, None
    trainer_args.output_dir = str(unfinished)
    stop = StopOnSignal(AgreedStop(interruption, ranks))
    passing_over = replaced_items(args.bad_images, len(dataset))
    reports = [] if passing_over is None else [ReportReplaced(passing_over, dataset.paths.__getitem__, say)]
    trainer = DianaTrainer(
        model=model,
        args=trainer_args,
        dataset=dataset,
        collate=Collate(tokenizer.pad_token_id),
        tokenizer=tokenizer,
        schedule=file.schedule if file is not None else None,
        layer_wise=args.use_custom_trainer,
        text_lengths=list(dataset.text_lengths) if args.length_grouping else None,
        log_file=output_dir / LOG_NAME if ranks.is_main else None,
        replaced=passing_over,
        callbacks=[WholeCheckpoints(output_dir, keep, replaced), stop, *reports],
    )
    _quiet_console(trainer)
    if args.seed_per_rank:
        set_seed(trainer_args.seed + ranks.rank)
    model.set_attention(args.attn_implementation, torch.bfloat16 if trainer_args.bf16 else None)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped:
        say(f"stopped; go on with --resume_from_checkpoint True (the state is in {output_dir})")
    else:
        trainer.save_final(output_dir, model.config.checkpoint_dtype)
        _say_metrics(say, result.metrics, len(dataset))
        say(f"the model is in {output_dir}")
    from tbps_common.run.distributed import barrier

    barrier()
    if ranks.is_main:
        delete([unfinished])
    return interruption.exit_status if stop.stopped else 0


def _choose_deepspeed(rest: list[str], ranks: "Ranks", *, cpu: bool) -> tuple[list[str], DeepSpeedFile | None, bool]:
    """Words for the trainer, what is followed of the file without DeepSpeed, and whether DeepSpeed is used."""
    rest, path = take_flag(rest, "deepspeed")
    if not path:
        return rest, None, False
    if not cpu and ranks.distributed and deepspeed_is_installed():
        return [*rest, "--deepspeed", path], None, True
    if ranks.is_main:
        reason = "one process" if not ranks.distributed else "no GPU" if cpu else "DeepSpeed is not installed"
        print(f"{reason}: schedule and clipping of {path} are computed without DeepSpeed, weights are not partitioned")
    return rest, read_deepspeed_file(path), False


def _with_defaults(rest: list[str]) -> list[str]:
    """Choices for flags that are not given: what DiaNA needs, where the trainer's own default is another."""
    defaults = [
        # Every trained parameter takes part in every step, so that DDP need not look for others.
        *("--ddp_find_unused_parameters", "False"),
        *("--remove_unused_columns", "False"),
        *("--report_to", "none"),
        *("--disable_tqdm", str(not sys.stderr.isatty())),
    ]
    return [*defaults, *rest]


def _checkpoint(args: argparse.Namespace, trainer_args: Any, output_dir: Path) -> Path | None:
    requested = requested_checkpoint(str(trainer_args.resume_from_checkpoint or ""), output_dir)
    folder = requested or (
        checkpoint_to_resume(output_dir, overwrite=args.overwrite_output_dir) if trainer_args.do_train else None
    )
    if folder is not None:
        check_state(folder)
        _check_readable(folder)
    return folder


def _check_readable(folder: Path) -> None:
    """Read the files of a run's state once: the trainer would answer damage with a traceback."""
    from tbps_common.run.checkpoint import load_checkpoint_file

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        if (folder / name).is_file():
            load_checkpoint_file(folder / name, mmap=True)
    if not (folder / "optimizer.pt").is_file() and not list(folder.glob("global_step*")):
        raise CheckpointError(f"{folder} holds no optimizer state: start from its weights with --pretrained")


def _device_sentence(device: Any, ranks: "Ranks", requested: str, *, use_deepspeed: bool) -> str:
    from tbps_common.run.device import device_sentence

    how = "DeepSpeed" if use_deepspeed else f"{ranks.world_size} process(es)"
    return device_sentence(requested, device, how)


def _write_arguments(output_dir: Path, args: argparse.Namespace, trainer_args: Any, *, append: bool) -> None:
    own = {name: value for name, value in sorted(vars(args).items())}
    write_json(output_dir / ARGUMENTS_NAME, {"diana": own, "trainer": json.loads(trainer_args.to_json_string())})
    if not append:
        (output_dir / LOG_NAME).unlink(missing_ok=True)


def _quiet_console(trainer: Any) -> None:
    """The trainer's own log lines give way to the released one, which `DianaTrainer.log` prints."""
    from transformers import PrinterCallback, ProgressCallback

    from diana.training.callbacks import Bar

    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar)


def _say_metrics(say: Any, metrics: dict[str, float], samples: int) -> None:
    say("***** train metrics *****")
    for name, value in sorted({**metrics, "train_samples": samples}.items()):
        say(f"  {name:<24} = {value:.4f}" if isinstance(value, float) else f"  {name:<24} = {value}")


def _silent(*words: Any, force: bool = False, **options: Any) -> None:
    if force:
        print(*words, **options)


def _leave_group() -> None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    if sys.exc_info()[0] is not None and dist.get_backend() == "nccl":
        return  # the others may sit in a collective that never ends; the launcher ends them when this process is gone
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def main(argv: list[str]) -> int:
    """`train.py`: parse, check, train."""
    return train(*parse_and_check(argv))
