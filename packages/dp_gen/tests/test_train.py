"""`train.py`: what it writes, and that whatever ends a run, and whenever, going on ends in the same bits."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dp_gen import DiversePersonPipeline
from dp_gen.cli import train_main
from tbps_common.run.checkpoint import load_checkpoint_file

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
PACKAGE = Path(__file__).resolve().parents[1]
Flags = Callable[..., list[str]]
Forget = Callable[[], None]


@contextmanager
def signal_at(text: str, number: int) -> Iterator[None]:
    """Send a signal to this process as soon as a log line contains `text`."""

    class Sender(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                logger.removeHandler(self)
                os.kill(os.getpid(), number)

    logger, sender = logging.getLogger("dp_gen"), Sender()
    logger.addHandler(sender)
    try:
        yield
    finally:
        logger.removeHandler(sender)


def assert_same(one: Any, other: Any, where: str) -> None:
    """Equal to the last bit, through all nesting."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other)):
            assert_same(left, right, f"{where}[{number}]")
    elif hasattr(one, "tolist"):
        assert one.tolist() == other.tolist(), where
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path, step: int) -> None:
    name = f"checkpoint-{step}"
    assert_same(load_file(one / name / "model.safetensors"), load_file(other / name / "model.safetensors"), "weights")
    for file in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        assert_same(load_checkpoint_file(one / name / file), load_checkpoint_file(other / name / file), file)
    assert (one / name / "progress.json").read_text("utf-8") == (other / name / "progress.json").read_text("utf-8")


@pytest.fixture
def whole(tmp_path: Path, train_flags: Flags, fresh_accelerate: Forget) -> Callable[..., Path]:
    """`whole(*more)`: the output folder of a run of six updates that nothing happened to."""

    def run(*more: str) -> Path:
        output_dir = tmp_path / "whole"
        assert train_main(train_flags(output_dir, "--max_train_steps", "6", *more)) == 0
        fresh_accelerate()
        return output_dir

    return run


def test_a_run_and_what_it_leaves(tmp_path: Path, train_flags: Flags) -> None:
    flags = train_flags(tmp_path, "--report_to", "tensorboard", "--keep_interval", "2", "--max_train_steps", "5")
    assert train_main(flags) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"checkpoint-2", "checkpoint-4", "dp_gen_config.json", "controller", "unet", "train_log.txt"} <= names
    assert {path.name for path in (tmp_path / "checkpoint-4").iterdir()} == {
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "progress.json",
    }
    progress = json.loads((tmp_path / "checkpoint-4" / "progress.json").read_text("utf-8"))
    assert progress == {"step": 4, "epoch": 1, "batch": 1, "seed": 42, "samples_per_batch": 2}
    pipeline = DiversePersonPipeline.from_pretrained(tmp_path)
    assert pipeline.settings["resolution"] == 64 and pipeline.settings["args"]["lr"] == 1e-3
    text = (tmp_path / "train_log.txt").read_text("utf-8")
    assert "there is no checkpoint" in text and "denoise_loss" in text and "localization_loss" in text
    points = logged_scalars(tmp_path / "logs")
    assert [step for step, _ in points["denoise_loss"]] == [1, 2, 3, 4, 5]
    assert points.keys() >= {"train_loss", "localization_loss", "lr", "grad_norm", "images_per_s"}
    for (_, total), (_, denoise), (_, located) in zip(
        *(points[n] for n in ("train_loss", "denoise_loss", "localization_loss"))
    ):
        assert total == pytest.approx(denoise + 1e-3 * located, rel=1e-5)


def logged_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "DiversePerson"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_short_run_logs_its_losses_too(tmp_path: Path, train_flags: Flags) -> None:
    """Shorter than --log_every: every checkpoint, and the end, read the losses back."""
    assert train_main(train_flags(tmp_path, "--log_every", "10", "--max_train_steps", "3")) == 0
    text = (tmp_path / "train_log.txt").read_text("utf-8")
    assert "step 2/3: train_loss" in text and "step 3/3: train_loss" in text


def test_only_the_last_checkpoint_is_kept(tmp_path: Path, train_flags: Flags) -> None:
    assert train_main(train_flags(tmp_path, "--keep_interval", "100")) == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("moment", "number", "status", "more"),
    [
        ("step 2/6", signal.SIGTERM, 143, ()),
        ("step 4/6", signal.SIGINT, 130, ("--gradient_accumulation_steps", "2")),
    ],
    ids=["sigterm", "ctrl-c, accumulation"],
)
def test_a_stopped_run_goes_on_exactly(
    moment: str,
    number: int,
    status: int,
    more: tuple[str, ...],
    tmp_path: Path,
    train_flags: Flags,
    whole: Callable[..., Path],
    fresh_accelerate: Forget,
) -> None:
    reference = whole(*more)
    output_dir = tmp_path / "stopped"
    flags = train_flags(output_dir, "--max_train_steps", "6", *more)
    with signal_at(moment, number):
        assert train_main(flags) == status
    assert not (output_dir / "dp_gen_config.json").exists()
    fresh_accelerate()
    assert train_main(flags) == 0
    assert_same_run(output_dir, reference, 6)
    assert_same(
        load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors"),
        load_file(reference / "unet" / "diffusion_pytorch_model.safetensors"),
        "pipeline",
    )


def test_workers_change_nothing(tmp_path: Path, train_flags: Flags, whole: Callable[..., Path]) -> None:
    reference = whole()
    assert train_main(train_flags(tmp_path / "w", "--max_train_steps", "6", "--dataloader_num_workers", "2")) == 0
    assert_same_run(tmp_path / "w", reference, 6)


def test_incomplete_checkpoints_are_passed_over(tmp_path: Path, train_flags: Flags, fresh_accelerate: Forget) -> None:
    flags = train_flags(tmp_path, "--max_train_steps", "4")
    assert train_main(flags) == 0
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "optimizer.bin").unlink()
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-9.tmp")
    fresh_accelerate()
    assert train_main([*flags, "--max_train_steps", "5"]) == 0
    text = (tmp_path / "train_log.txt").read_text("utf-8")
    assert "resuming from" in text and "update 4" in text
    assert not (tmp_path / "checkpoint-9.tmp").exists()


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("optimizer.bin", lambda path: path.write_bytes(path.read_bytes()[:5000]), "optimizer.bin"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:5000]), "model.safetensors"),
        ("progress.json", lambda path: path.write_text("{", "utf-8"), "progress.json"),
    ],
    ids=["optimizer", "weights", "progress"],
)
def test_a_damaged_checkpoint_is_named(
    file: str,
    damage: Callable[[Path], Any],
    said: str,
    tmp_path: Path,
    train_flags: Flags,
    fresh_accelerate: Forget,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = train_flags(tmp_path, "--max_train_steps", "2")
    assert train_main(flags) == 0
    damage(tmp_path / "checkpoint-2" / file)
    fresh_accelerate()
    assert train_main([*flags, "--max_train_steps", "3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and error.startswith("error: ")


def test_named_checkpoints(
    tmp_path: Path, train_flags: Flags, fresh_accelerate: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(train_flags(tmp_path, "--resume_from_checkpoint", "checkpoint-7")) == 2
    assert "checkpoint-7 is neither a folder" in capsys.readouterr().err
    assert not (tmp_path / "train_log.txt").exists()
    fresh_accelerate()
    flags = train_flags(tmp_path, "--keep_interval", "2", "--max_train_steps", "4")
    assert train_main(flags) == 0
    fresh_accelerate()
    # The authors look only at the name, inside the output folder.
    assert train_main([*flags, "--resume_from_checkpoint", "elsewhere/checkpoint-2"]) == 0
    assert "update 2" in (tmp_path / "train_log.txt").read_text("utf-8")


def test_a_checkpoint_of_the_authors_code_resumes_by_its_name(
    tmp_path: Path, train_flags: Flags, fresh_accelerate: Forget
) -> None:
    from dp_gen.model.weights import official_layout
    from tbps_common.run.checkpoint import save_checkpoint

    flags = train_flags(tmp_path, "--max_train_steps", "4")
    assert train_main(flags) == 0
    folder = tmp_path / "checkpoint-4"
    save_checkpoint(official_layout(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    for name in ("model.safetensors", "progress.json", "random_states_0.pkl"):
        (folder / name).unlink()
    fresh_accelerate()
    assert train_main([*flags, "--max_train_steps", "5"]) == 0
    text = (tmp_path / "train_log.txt").read_text("utf-8")
    assert "update 4, epoch 2" in text and "cannot go on exactly" in text


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, train_flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(train_flags(tmp_path, "--lr", "1e30", "--max_train_steps", "6")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not a finite number at update" in error and "--lr" in error
    for folder in tmp_path.glob("checkpoint-*"):
        state = load_file(folder / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_an_image_that_cannot_be_read(
    tmp_path: Path, train_flags: Flags, helpers: Any, fresh_accelerate: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    helpers.write_training_folder(tmp_path / "data", 5)
    (image,) = tmp_path.glob("data/**/000000001.png")
    image.write_bytes(b"")
    flags = train_flags(tmp_path / "out", "--dataset_name", str(tmp_path / "data"), "--max_train_steps", "4")
    assert train_main(flags) == 2
    assert str(image) in capsys.readouterr().err
    fresh_accelerate()
    assert train_main([*flags, "--bad_images", "skip"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("the next item takes their place") == 1 and str(image) in shown


def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, train_flags: Flags, fresh_accelerate: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = train_flags(tmp_path, "--max_train_steps", "2")
    assert train_main(flags) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    fresh_accelerate()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        assert train_main([*flags, "--max_train_steps", "4"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-4" in error and error.startswith("error: ")
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before
    assert not list(tmp_path.glob("*.tmp"))


def test_other_flags_train_too(tmp_path: Path, train_flags: Flags) -> None:
    more = [
        "--train_text_encoder",
        "--gradient_checkpointing",
        "--scale_lr",
        "--lr",
        "1e-5",
        "--mixed_precision",
        "bf16",
    ]
    more += ["--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--image_encoder_trainable_layers", "0"]
    more += ["--enable_xformers_memory_efficient_attention", "--attribute_loc_norm", "--uncondition_prob", "0.5"]
    assert train_main(train_flags(tmp_path, *more, "--max_train_steps", "2")) == 0
    assert "xformers" in (tmp_path / "train_log.txt").read_text("utf-8")
    state = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert (
        state["vae.quant_conv.weight"].dtype == torch.bfloat16 and state["unet.conv_in.weight"].dtype == torch.float32
    )
    assert (
        load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")["quant_conv.weight"].dtype == torch.float32
    )


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, train_flags: Flags, whole: Callable[..., Path]) -> None:
    """SIGKILL, also inside a save, until a run gets through: the weights are those of an uninterrupted run."""
    import multiprocessing

    reference = whole("--checkpointing_steps", "1")
    output_dir = tmp_path / "killed"
    flags = train_flags(output_dir, "--max_train_steps", "6", "--checkpointing_steps", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dp_gen.training.start", "diffusers", "transformers", "accelerate"])
    kills = {"inside a save": 0, "later": 0}
    for attempt in range(30):
        child = context.Process(target=train_main, args=(flags,))
        child.start()
        inside = attempt % 2 == 0
        while child.is_alive():
            if inside and list(output_dir.glob("checkpoint-*.tmp/*")):
                break
            if not inside and list(output_dir.glob("checkpoint-*/progress.json")):
                time.sleep(0.05 * attempt)
                break
            time.sleep(0.001)
        if child.is_alive() and min(kills.values()) < 2:
            child.kill()
            kills["inside a save" if inside else "later"] += 1
        child.join()
        if child.exitcode == 0:
            break
    assert min(kills.values()) >= 2, kills
    assert_same_run(output_dir, reference, 6)


@pytest.mark.slow
def test_two_processes(tmp_path: Path, train_flags: Flags) -> None:
    """gloo: each process takes its share of the samples, and a stopped pair goes on exactly."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def run(output_dir: Path, *more: str) -> None:
        flags = train_flags(output_dir, "--train_batch_size", "1", "--keep_interval", "2", *more)
        command = [*launcher, str(PACKAGE / "train.py"), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr

    run(tmp_path / "whole", "--max_train_steps", "4")
    run(tmp_path / "halves", "--max_train_steps", "2")
    run(tmp_path / "halves", "--max_train_steps", "4")
    assert_same_run(tmp_path / "whole", tmp_path / "halves", 4)
    states = [
        load_checkpoint_file(tmp_path / "whole" / "checkpoint-4" / f"random_states_{rank}.pkl") for rank in (0, 1)
    ]
    assert not torch.equal(states[0]["torch_manual_seed"], states[1]["torch_manual_seed"])


@pytest.mark.slow
def test_one_failing_process_ends_the_job(
    tmp_path: Path, train_flags: Flags, second_process_raises: dict[str, str]
) -> None:
    """Process 1 raises in its second update; the other one sits in a collective that will never end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = train_flags(tmp_path / "out", "--train_batch_size", "1", "--checkpointing_steps", "3")
    began = time.monotonic()
    done = subprocess.run(
        [*launcher, str(PACKAGE / "train.py"), *flags],
        env=second_process_raises,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and time.monotonic() - began < 200
    assert "Traceback" in done.stderr and "rank one is lost" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
def test_the_readme_command_through_accelerate_launch(
    tmp_path: Path, tiny_models: Path, training_folder: Path, helpers: Any
) -> None:
    """The paper's command, run in a folder that holds train.py and the two models under their names."""
    shutil.copyfile(PACKAGE / "train.py", tmp_path / "train.py")
    for name in ("runwayml", "openai"):
        shutil.copytree(tiny_models / name, tmp_path / name)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision=bf16", "train.py"]
    command += [
        *helpers.README_FLAGS,
        "--dataset_name",
        str(training_folder),
        "--logging_dir",
        "log",
        "--output_dir",
        "out",
    ]
    command += ["--max_train_steps", "2", "--checkpointing_steps", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second one finds everything done
        subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, timeout=600)
    assert DiversePersonPipeline.from_pretrained(tmp_path / "out").settings["args"]["train_batch_size"] == 32
    assert list((tmp_path / "log").rglob("events.out.tfevents.*"))
