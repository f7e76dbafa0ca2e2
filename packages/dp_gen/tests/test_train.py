"""`train.py`: what it writes, and that whatever ends a run, and whenever, going on ends in the same bits."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dp_gen.train as training
from dp_gen import DiversePersonPipeline
from dp_gen.cli import train_main
from tbps_common.run.checkpoint import load_checkpoint_file, save_checkpoint
from tbps_world.checks import assert_same, signal_at

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
PACKAGE = Path(__file__).resolve().parents[1]
Flags = Callable[..., list[str]]
Forget = Callable[[], None]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    name = f"checkpoint-{step}"
    assert_same(load_file(one / name / "model.safetensors"), load_file(other / name / "model.safetensors"), "weights")
    for file in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        assert_same(load_checkpoint_file(one / name / file), load_checkpoint_file(other / name / file), file)
    assert (one / name / "progress.json").read_text("utf-8") == (other / name / "progress.json").read_text("utf-8")


@pytest.fixture
def checkpoints(finished_run: Path, tmp_path: Path) -> Path:
    """An output folder with checkpoints 2, 4 and 6, to be written to."""
    for step in (2, 4, 6):
        shutil.copytree(finished_run / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    return tmp_path / "out"


def remove_checkpoints(output_dir: Path, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(output_dir / f"checkpoint-{step}")


def logged(output_dir: Path) -> str:
    return (output_dir / "train_log.txt").read_text("utf-8")


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


def test_the_last_checkpoint_alone_is_kept_and_a_short_run_logs_its_losses(tmp_path: Path, train_flags: Flags) -> None:
    """Shorter than --log_every: every checkpoint, and the end, read the losses back."""
    assert train_main(train_flags(tmp_path, "--log_every", "10", "--keep_interval", "100")) == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    for step in (2, 4, 5):
        assert f"step {step}/5: train_loss" in logged(tmp_path)


def test_a_checkpoint_that_is_written_while_training_goes_on_is_that_of_its_update(
    tmp_path: Path, train_flags: Flags, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, update = [], training.update

    def slow(*args: Any, **kwargs: Any) -> None:
        started.append(threading.current_thread())
        assert next_update.wait(60)
        save_file(*args, **kwargs)

    def counted(*args: Any) -> Any:
        result = update(*args)
        if started:  # the update after checkpoint 2 has changed the weights
            next_update.set()
        return result

    next_update = threading.Event()
    monkeypatch.setattr("dp_gen.resume.save_file", slow)
    monkeypatch.setattr(training, "update", counted)
    assert train_main(train_flags(tmp_path, "--max_train_steps", "3", "--keep_interval", "2")) == 0
    assert len(started) == 1 and started[0] is not threading.main_thread()
    assert_same_run(tmp_path, finished_run, 2)


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
    finished_run: Path,
    fresh_accelerate: Forget,
) -> None:
    reference = finished_run
    if more:
        reference = tmp_path / "whole"
        assert train_main(train_flags(reference, "--max_train_steps", "6", *more)) == 0
        fresh_accelerate()
    output_dir = tmp_path / "stopped"
    flags = train_flags(output_dir, "--max_train_steps", "6", *more)
    with signal_at("dp_gen", moment, number):
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


def test_workers_change_nothing(tmp_path: Path, train_flags: Flags, finished_run: Path) -> None:
    flags = train_flags(tmp_path, "--max_train_steps", "6", "--keep_interval", "2", "--dataloader_num_workers", "2")
    assert train_main(flags) == 0
    assert_same_run(tmp_path, finished_run, 6)


def test_incomplete_checkpoints_are_passed_over(checkpoints: Path, train_flags: Flags) -> None:
    (checkpoints / "checkpoint-6" / "optimizer.bin").unlink()
    (checkpoints / "checkpoint-4").rename(checkpoints / "checkpoint-9.tmp")
    assert train_main(train_flags(checkpoints, "--max_train_steps", "3")) == 0
    assert "resuming from" in logged(checkpoints) and "update 2" in logged(checkpoints)
    assert not (checkpoints / "checkpoint-9.tmp").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("optimizer.bin", cut),
        ("optimizer.bin", zeros),
        ("scheduler.bin", empty),
        ("model.safetensors", cut),
        ("model.safetensors", empty),
        ("progress.json", lambda path: path.write_text("{", "utf-8")),
    ],
    ids=["cut optimizer", "zeroed optimizer", "empty schedule", "cut weights", "empty weights", "progress"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    file: str,
    damage: Callable[[Path], Any],
    checkpoints: Path,
    train_flags: Flags,
    fresh_accelerate: Forget,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newest, sound = checkpoints / "checkpoint-6", checkpoints / "checkpoint-4"
    damage(newest / file)
    flags = train_flags(checkpoints, "--max_train_steps", "4", "--keep_interval", "2")

    def refusal(*more: str) -> str:
        fresh_accelerate()
        assert train_main([*flags, *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and file in error and str(newest) in error
        return error

    assert f"resume from {sound} instead" in refusal("--resume_from_checkpoint", "checkpoint-6")
    fresh_accelerate()
    assert train_main(flags) == 0
    assert f"{newest} is damaged" in logged(checkpoints) and f"resuming from {sound}" in logged(checkpoints)
    remove_checkpoints(checkpoints, 2, 4)
    assert "start a new training" in refusal()


def test_damage_that_only_reading_finds_is_named_with_the_checkpoint_before(
    checkpoints: Path, train_flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoints / "checkpoint-6" / "optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    assert train_main(train_flags(checkpoints, "--max_train_steps", "8")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(file) in error and str(checkpoints / "checkpoint-4") in error


def test_named_checkpoints(
    checkpoints: Path, train_flags: Flags, fresh_accelerate: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = train_flags(checkpoints, "--keep_interval", "2", "--max_train_steps", "3")
    assert train_main([*flags, "--resume_from_checkpoint", "checkpoint-7"]) == 2
    assert "checkpoint-7 is neither a folder" in capsys.readouterr().err
    assert not (checkpoints / "train_log.txt").exists()
    fresh_accelerate()
    # The authors look only at the name, inside the output folder.
    assert train_main([*flags, "--resume_from_checkpoint", "elsewhere/checkpoint-2"]) == 0
    assert "update 2" in logged(checkpoints)


def test_a_checkpoint_of_the_authors_code_resumes_by_its_name(checkpoints: Path, train_flags: Flags) -> None:
    from dp_gen.model.weights import official_layout

    remove_checkpoints(checkpoints, 2, 6)
    folder = checkpoints / "checkpoint-4"
    save_checkpoint(official_layout(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    for name in ("model.safetensors", "progress.json", "random_states_0.pkl"):
        (folder / name).unlink()
    assert train_main(train_flags(checkpoints)) == 0
    assert "update 4, epoch 2" in logged(checkpoints) and "cannot be restored exactly" in logged(checkpoints)


def logged_rates(output_dir: Path) -> list[str]:
    return re.findall(r"lr ([\d.e+-]+)", logged(output_dir))


def test_the_remaining_updates_have_the_rates_of_todays_flags(
    tmp_path: Path, train_flags: Flags, fresh_accelerate: Forget
) -> None:
    """A cosine that came to its end goes on where a longer one is; --lr counts too."""

    def rates(updates: int, *more: str) -> list[str]:
        fresh_accelerate()
        flags = train_flags(tmp_path, "--lr_scheduler", "cosine", "--lr_warmup_steps", "0", "--log_every", "1", *more)
        assert train_main([*flags, "--keep_interval", "2", "--max_train_steps", str(updates)]) == 0
        return logged_rates(tmp_path)

    assert rates(2) == ["0.001", "0.0005"]
    # cos(pi / 2), cos(3 pi / 4)
    assert rates(4)[2:] == ["0.0005", "0.0001464"]
    assert rates(4, "--lr", "2e-3", "--resume_from_checkpoint", "checkpoint-2")[4:] == ["0.001", "0.0002929"]
    assert "the learning rates are [0.002, 0.002] now" in logged(tmp_path)
    # An earlier version of this program took a step of the schedule per process.
    schedule = tmp_path / "checkpoint-2" / "scheduler.bin"
    save_checkpoint({**load_checkpoint_file(schedule), "last_epoch": 4}, schedule)
    assert rates(4, "--resume_from_checkpoint", "checkpoint-2")[6:] == ["0.0005", "0.0001464"]
    assert "--scheduler_steps_per_process keeps it" in logged(tmp_path)


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
    checkpoints: Path, train_flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    remove_checkpoints(checkpoints, 4, 6)
    before = {path: path.read_bytes() for path in (checkpoints / "checkpoint-2").iterdir()}
    flags = train_flags(checkpoints, "--checkpointing_steps", "1", "--max_train_steps", "4")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        assert train_main(flags) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-3" in error and error.startswith("error: ")
    assert {path: path.read_bytes() for path in (checkpoints / "checkpoint-2").iterdir()} == before
    assert not list(checkpoints.glob("*.tmp"))


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
def test_killed_at_any_moment(tmp_path: Path, train_flags: Flags, finished_run: Path) -> None:
    """SIGKILL, also inside a save, until a run gets through: the weights are those of an uninterrupted run."""
    import multiprocessing

    output_dir = tmp_path / "killed"
    flags = train_flags(output_dir, "--max_train_steps", "6", "--checkpointing_steps", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dp_gen.train", "diffusers", "transformers", "accelerate"])
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
    assert_same_run(output_dir, finished_run, 6)


@pytest.mark.slow
def test_two_processes(tmp_path: Path, train_flags: Flags) -> None:
    """gloo: each process takes its share of the samples, and a stopped pair goes on exactly."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def run(output_dir: Path, *more: str) -> dict[str, Any]:
        """The last state of the schedule, whose cosine ends with the run."""
        cosine = ["--lr_scheduler", "cosine", "--lr_warmup_steps", "0", "--lr", "1e-3"]
        flags = train_flags(output_dir, "--train_batch_size", "1", "--keep_interval", "2", *cosine, *more)
        command = [*launcher, str(PACKAGE / "train.py"), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        last = max(output_dir.glob("checkpoint-*"), key=lambda path: path.name)
        return load_checkpoint_file(last / "scheduler.bin")

    whole = run(tmp_path / "whole", "--max_train_steps", "4")
    assert whole["last_epoch"] == 4 and whole["_last_lr"] == pytest.approx([0, 0], abs=1e-12)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "halves" / "checkpoint-2")
    run(tmp_path / "halves", "--max_train_steps", "4")
    assert_same_run(tmp_path / "whole", tmp_path / "halves", 4)
    states = [
        load_checkpoint_file(tmp_path / "whole" / "checkpoint-4" / f"random_states_{rank}.pkl") for rank in (0, 1)
    ]
    assert not torch.equal(states[0]["torch_manual_seed"], states[1]["torch_manual_seed"])
    # As released: a step per process, so that two processes come to the peak again.
    released = run(tmp_path / "released", "--max_train_steps", "2", "--scheduler_steps_per_process")
    assert released["last_epoch"] == 4 and released["_last_lr"] == pytest.approx([1e-3, 1e-3])


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
