"""Flags of `transformers.TrainingArguments`: what the authors' version called them, and what today's does.

transformers is imported in `read_trainer_flags` alone, because flags and paths are checked before it is loaded.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tbps_common.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Old name -> today's. The values mean the same.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}
# Accepted and without effect: what they chose is now the only way, or concerns hardware this project does not serve.
DROPPED = frozenset(
    "save_safetensors use_mps_device jit_mode_eval use_ipex fp16_opt_level half_precision_backend fp16_backend "
    "tpu_num_cores tpu_metrics_debug past_index use_legacy_prediction_loop mp_parameters ray_scope dispatch_batches "
    "split_batches include_tokens_per_second include_inputs_for_metrics push_to_hub_organization tokenizers_parallelism "
    "local_rank local-rank gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
    "activation_checkpointing_kwargs".split()
)
# Translated by hand below.
TRANSLATED = frozenset(("warmup_ratio", "logging_dir", "group_by_length", "adafactor"))
_EVALUATION = "training does not evaluate; DiaNA/eval/shell/eval.sh does"
_OWN_LOSSES = "the losses are DiaNA's own"
_OWN_BATCHES = "the batches are DiaNA's own"
# Flags that cannot act here -> why. A value other than the default is refused.
CANNOT_ACT = {
    "label_smoothing_factor": _OWN_LOSSES,
    "label_names": _OWN_LOSSES,
    "neftune_noise_alpha": "it is for language models alone; --mask_probability disturbs the texts",
    "use_liger_kernel": "its kernels are for language models alone",
    "liger_kernel_config": "its kernels are for language models alone",
    "use_cache": "training keeps no cache",
    "accelerator_config": _OWN_BATCHES,
    "dataloader_in_order": _OWN_BATCHES,
    "dataloader_multiprocessing_context": _OWN_BATCHES,
    "auto_find_batch_size": f"{_OWN_BATCHES}; give a smaller --per_device_train_batch_size",
    "train_sampling_strategy": f"{_OWN_BATCHES}; --length_grouping True joins texts of similar length",
    "length_column_name": f"{_OWN_BATCHES}; --length_grouping True joins texts of similar length",
    "enable_jit_checkpoint": "SIGTERM saves the state in any case",
    "push_to_hub": "upload the finished folder with the command hf upload",
    **dict.fromkeys(
        "eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps per_device_eval_batch_size prediction_loss_only batch_eval_metrics include_for_metrics "
        "bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model greater_is_better do_eval "
        "do_predict".split(),
        _EVALUATION,
    ),
}
_FALSE = ("false", "0", "no", "f", "n")
# Names met in scripts. Any other word is given to transformers before anything else is looked at, so that a typing
# error is reported as such; the list need not be complete.
_COMMON = frozenset(
    "output_dir dataloader_num_workers bf16 fp16 tf32 num_train_epochs max_steps per_device_train_batch_size "
    "per_device_eval_batch_size gradient_accumulation_steps eval_strategy save_strategy save_steps save_total_limit "
    "learning_rate weight_decay warmup_steps lr_scheduler_type logging_steps logging_strategy logging_first_step "
    "log_level do_train do_eval do_predict optim adam_beta1 adam_beta2 adam_epsilon max_grad_norm report_to deepspeed "
    "seed data_seed use_cpu resume_from_checkpoint run_name disable_tqdm dataloader_drop_last dataloader_pin_memory "
    "ddp_timeout ddp_find_unused_parameters remove_unused_columns save_only_model full_determinism".split()
)


def is_common(word: str) -> bool:
    """Whether a word of the command line is a known flag of the trainer, by today's name or an earlier one."""
    name = word.removeprefix("--").partition("=")[0]
    return name in _COMMON or name in RENAMED or name in DROPPED or name in TRANSLATED


def has_unknown(words: Sequence[str]) -> bool:
    """Whether some flag is not a common one: probably a typing error, which is then reported before anything else."""
    return any(word.startswith("--") and not is_common(word) for word in words)


def take_flag(words: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """Take a flag of one value out of the words; its last value counts, a missing value is empty.

    Returns:
        The other words, and the value (None: the flag is not there).
    """
    rest, value = [], None
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == f"--{name}":
            value = ""
            if position < len(words) and not words[position].startswith("--"):
                value = words[position]
                position += 1
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, value


def asks_for_cpu(words: Sequence[str]) -> bool:
    """Whether the trainer is told to leave GPUs alone: `--use_cpu True`, or by its earlier name `--no_cuda True`."""
    values = (take_flag(words, name)[1] for name in ("use_cpu", "no_cuda"))
    return any(value is not None and value.lower() not in _FALSE for value in values)


def modernise(words: Sequence[str]) -> list[str]:
    """Words that today's `TrainingArguments` accepts and that mean what the old ones meant."""
    result = []
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        result.append(f"--{RENAMED[name]}{equals}{value}" if word.startswith("--") and name in RENAMED else word)
    for name in sorted(DROPPED):
        result, value = take_flag(result, name)
        if value is not None:
            instead = "; --grad_checkpointing says it" if "checkpointing" in name else ""
            print(f"note: --{name} has no effect here{instead}", file=sys.stderr)
    result, ratio = take_flag(result, "warmup_ratio")
    if ratio:
        rest, steps = take_flag(result, "warmup_steps")
        # A share of the training is given as a number of steps below one today; a number of steps always came first.
        if steps is None or float(steps or 0) == 0:
            result = [*rest, "--warmup_steps", ratio]
    result, folder = take_flag(result, "logging_dir")
    if folder:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", folder)
    result, grouped = take_flag(result, "group_by_length")
    if grouped is not None and grouped.lower() not in _FALSE:
        print("note: --group_by_length has no effect here; --length_grouping True does it", file=sys.stderr)
    result, adafactor = take_flag(result, "adafactor")
    if adafactor is not None and adafactor.lower() not in _FALSE:
        result = [*result, "--optim", "adafactor"]
    return result


def unusable_flag(error: Exception) -> InputError:
    """What transformers says about flags that contradict each other or the machine, as a user's mistake."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"a flag of the trainer cannot be used: {first}")


def read_trainer_flags(words: Sequence[str], *, cpu: bool) -> "TrainingArguments":
    """Read the flags of the trainer, by today's names or earlier ones.

    Args:
        words: what `parse_train_flags` left over, without `--deepspeed` where DeepSpeed is not to be used.
        cpu: compute on the CPU.

    Raises:
        InputError: a flag is unknown or cannot act here, a value cannot be used, or values contradict each other.
        SystemExit: status 2 after argparse's message on a value of the wrong type.
    """
    from transformers import HfArgumentParser, TrainingArguments

    words = modernise(words)
    if cpu:
        words = [*take_flag(words, "use_cpu")[0], "--use_cpu", "True"]
    parser = HfArgumentParser(TrainingArguments, prog="train.py", allow_abbrev=False)  # type: ignore[arg-type]
    # Before the others: TrainingArguments leaves settings of DeepSpeed and of the precision in the environment.
    defaults = TrainingArguments(output_dir="unused", use_cpu=cpu)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError, ImportError) as error:
        raise unusable_flag(error) from error
    if unknown:
        raise InputError(f"unknown flags: {' '.join(unknown)} (train.py --help lists the known ones)")
    for name, why in CANNOT_ACT.items():
        if getattr(arguments, name, None) != getattr(defaults, name, None):
            raise InputError(f"--{name} cannot be used here ({why}): leave it out")
    if not arguments.output_dir:
        raise InputError("--output_dir is missing: name the folder for checkpoints")
    return arguments
