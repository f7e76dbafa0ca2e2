"""fafa-syncpr pairs and lora: what is trained, exact resumption, and a file that diffusers loads."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fafa.cli import syncpr_main
from fafa.syncpr.denoising import FlowMatching, NoisePrediction, denoising_of, packed, picture_ids
from fafa.syncpr.lora import read_captions
from fafa.syncpr.pairs import side_by_side
from fafa.syncpr.text_to_image import Sampling, TextToImage, load_lora, load_pipeline
from tbps_common.errors import DatasetError
from tbps_world.tiny.fafa import write_toy_data

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def train_flags(models: Path, pairs: Path) -> Callable[..., list[str]]:
    """`train_flags(out, *more, kind="sd")`: six steps of four pictures."""

    def flags(out: Path, *more: str, kind: str = "sd") -> list[str]:
        small = ["--height", "32", "--width", "32", "--batch-size", "4", "--rank", "2", "--num-workers", "0"]
        pace = ["--steps", "6", "--warmup", "2", "--log-every", "2", "--save-every", "3", "--learning-rate", "1e-2"]
        places = ["--data", str(pairs), "--model", str(models / kind), "--out", str(out), "--device", "cpu"]
        return ["lora", *places, *small, *pace, *more]

    return flags


@pytest.fixture
def train(train_flags: Callable[..., list[str]]) -> Callable[..., int]:
    """`train(out, *more, kind="sd")`: trains with `train_flags`; returns the exit status."""
    return lambda out, *more, kind="sd": syncpr_main(train_flags(out, *more, kind=kind))


def test_pairs_lie_side_by_side_with_the_prompt_of_the_images(pairs: Path) -> None:
    items = read_captions(pairs)
    assert len(items) == 16
    with Image.open(items[0][0]) as picture:
        assert picture.size == (32, 32)
        left, right = picture.getpixel((8, 14)), picture.getpixel((24, 14))
    assert left[0] > 150 > left[2] and right[2] > 150 > right[0]  # a red and a blue coat
    assert re.search(
        r"Left photograph: A person in a red shirt\. Right photograph: A person in a blue shirt\.", items[0][1]
    )
    halves = [Image.new("RGB", (10, 50), colour) for colour in ("red", "blue")]
    assert side_by_side(halves, 16, 32).getpixel((31, 15)) == (0, 0, 255)


def test_flux_patches_are_packed_as_diffusers_unpacks_them() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 10)
    # vae_scale_factor 1 and pictures of twice the size: diffusers counts pixels, these are latents.
    assert torch.equal(FluxPipeline._unpack_latents(packed(latents), 6, 10, 1), latents)
    assert picture_ids(2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_the_file_changes_what_the_pipeline_paints(
    models: Path, train: Callable[..., int], tmp_path: Path, kind: str
) -> None:
    assert train(tmp_path / "lora", kind=kind) == 0
    weights = load_file(tmp_path / "lora" / WEIGHTS)
    part = {"sd": "unet", "flux": "transformer"}[kind]
    assert weights and all(name.startswith(f"{part}.") for name in weights)
    ups = [value for name, value in weights.items() if re.search(r"lora(_B|\.up)", name)]
    assert ups and all(float(value.abs().max()) > 0 for value in ups)  # they begin at zero: every one was trained
    painted = []
    for scale in (None, 0.0, 1.0):
        pipeline = load_pipeline(str(models / kind), None, torch.float32)
        if scale is not None:
            load_lora(pipeline, str(tmp_path / "lora"), scale)
        engine = TextToImage(pipeline, torch.device("cpu"))
        painted.append(engine.paint(["a man in red"], [1], Sampling(32, 32, 2, 3.5))[0].tobytes())  # type: ignore[union-attr]
    assert painted[0] == painted[1] != painted[2]


def test_the_loaded_lora_computes_what_was_trained(models: Path, pairs: Path, tmp_path: Path, train: Any) -> None:
    """The denoiser of the training and the one with the loaded file give the same output for the same input."""
    trained: list[Any] = []

    def keep(pipeline: Any) -> Any:
        trained.append(denoising_of(pipeline))
        return trained[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fafa.syncpr.lora.denoising_of", keep)
        assert train(tmp_path / "lora") == 0
    pipeline = load_pipeline(str(models / "sd"), None, torch.float32)
    load_lora(pipeline, str(tmp_path / "lora" / WEIGHTS), 1.0)
    given = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 32)
    with torch.no_grad():
        ours = trained[0].denoiser(given[0], given[1], encoder_hidden_states=given[2]).sample
        theirs = pipeline.unet(given[0], given[1], encoder_hidden_states=given[2]).sample
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_half_precision_trains_a_lora_in_full_precision(train: Callable[..., int], tmp_path: Path, kind: str) -> None:
    assert train(tmp_path, "--dtype", "bfloat16", "--steps", "2", kind=kind) == 0
    weights = load_file(tmp_path / WEIGHTS)
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in weights.values())


def test_training_lowers_the_loss(train: Callable[..., int], tmp_path: Path) -> None:
    # Every step sees all 16 pictures, so that the means of the log are comparable.
    flags = ["--steps", "32", "--batch-size", "16", "--log-every", "8", "--save-every", "32", "--rank", "8"]
    assert train(tmp_path, *flags) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_killed_run_ends_with_the_same_weights(
    train: Callable[..., int], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path / "whole", kind=kind) == 0
    family = {"sd": NoisePrediction, "flux": FlowMatching}[kind]
    loss, calls = family.loss, 0

    def mortal(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return loss(*given)

    with monkeypatch.context() as patch:
        patch.setattr(family, "loss", mortal)
        assert train(tmp_path / "parts", kind=kind) == 130
    assert not json.loads((tmp_path / "parts" / f"{WEIGHTS}.manifest.json").read_text(encoding="utf-8"))["finished"]
    assert train(tmp_path / "parts", kind=kind) == 0
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and set(whole) == set(parts)
    logs = [(tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines() for name in ("whole", "parts")]
    assert [json.loads(line)["step"] for line in logs[1]] == [2, 4, 6] == [json.loads(line)["step"] for line in logs[0]]


@pytest.mark.slow
def test_sigkill_inside_a_save_and_after_it_changes_nothing(
    train: Callable[..., int],
    train_flags: Callable[..., list[str]],
    tmp_path: Path,
    kill_when_changed: Callable[..., None],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--save-every", "1") == 0

    def temporary() -> set[Path]:
        return set(parts.glob(".*"))

    def stored() -> int:
        path = parts / "training_state.pt"
        return path.stat().st_mtime_ns if path.exists() else 0

    flags = train_flags(parts, "--save-every", "1")
    preload = ["fafa.syncpr.lora", "diffusers", "transformers", "peft"]
    kill_when_changed(syncpr_main, flags, [temporary, stored, temporary, stored], preload)
    for leftover in parts.glob(".tmp??????"):  # of safetensors: removed once nobody can be writing it any more
        os.utime(leftover, (0, 0))
    assert syncpr_main(flags) == 0
    one, two = (load_file(folder / WEIGHTS) for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one) and set(one) == set(two)
    assert not temporary()


def test_finished_runs_are_left_alone_and_can_be_prolonged(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "a") == 0
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    capsys.readouterr()
    assert train(tmp_path / "a") == 0
    assert "all 6 steps are done already" in capsys.readouterr().out
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before
    assert json.loads((tmp_path / "a" / f"{WEIGHTS}.manifest.json").read_text(encoding="utf-8"))["finished"]
    assert train(tmp_path / "a", "--steps", "8") == 0 and train(tmp_path / "b", "--steps", "8") == 0
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert train(tmp_path / "a", "--rank", "4") == 2
    assert "rank=2" in capsys.readouterr().err


def test_a_kill_inside_the_last_save_leaves_no_old_file_behind(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fafa.syncpr import lora

    assert train(tmp_path / "whole") == 0
    saves: list[str] = []

    def mortal(name: str) -> Any:
        save = getattr(lora, name)

        def saving(*given: Any) -> None:
            if len(saves) == 3:  # after one of the two files of the second save
                raise KeyboardInterrupt
            saves.append(name)
            save(*given)

        return saving

    with monkeypatch.context() as patch:
        for name in ("save_lora", "save_checkpoint"):
            patch.setattr(lora, name, mortal(name))
        assert train(tmp_path / "parts") == 130
    assert train(tmp_path / "parts") == 0
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and set(whole) == set(parts)


def test_many_pairs_cost_no_look_through_their_folder_each(pairs: Path, tmp_path: Path) -> None:
    """Listing the folder for every file would be hopeless for as many pictures as SynCPR has."""
    images = tmp_path / "images"
    images.mkdir()
    (images / ".0.tmp.png").write_bytes(b"of a killed run")
    write_toy_data(tmp_path / "toy")
    listed: list[Path] = []
    glob = Path.glob

    def counted(self: Path, *given: Any, **named: Any) -> Any:
        listed.append(self)
        return glob(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "glob", counted)
        small = ["--height", "32", "--width", "32"]
        assert syncpr_main(["pairs", "--out", str(tmp_path), "--syncpr", str(tmp_path / "toy" / "syncpr"), *small]) == 0
    assert images not in listed and not (images / ".0.tmp.png").exists()
    assert sorted(path.name for path in images.iterdir()) == sorted(path.name for path in (pairs / "images").iterdir())


class Oracle(torch.nn.Module):
    """A denoiser that knows what it should predict, and notes what it was given."""

    def __init__(self, config: Any, prediction: torch.Tensor):
        super().__init__()
        self.config, self.prediction, self.given = config, prediction, {}

    def forward(self, *args: Any, **named: Any) -> Any:
        self.given = {**named, **dict(zip(("sample", "timestep"), args))}
        return SimpleNamespace(sample=self.prediction) if named.get("return_dict", True) else (self.prediction,)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_what_is_predicted_leads_the_sampler_back_to_the_picture(models: Path, tmp_path: Path, kind: str) -> None:
    """The training's target, given to the library's own sampler at the training's noise level, yields the latents."""
    from diffusers import DDIMScheduler

    latents, noise, uniform = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7])
    pipeline = load_pipeline(str(models / ("flux" if kind == "flow" else "sd")), None, torch.float32)
    if kind == "flow":
        oracle = Oracle(pipeline.transformer.config, packed(noise - latents))
    else:
        pipeline.scheduler = DDIMScheduler.from_config(
            {**pipeline.scheduler.config, "prediction_type": kind, "set_alpha_to_one": True}
        )
        share = pipeline.scheduler.alphas_cumprod[(uniform * 1000).long()].view(-1, 1, 1, 1)
        velocity = share.sqrt() * noise - (1 - share).sqrt() * latents  # Salimans and Ho 2022, appendix D
        oracle = Oracle(pipeline.unet.config, noise if kind == "epsilon" else velocity)
    method = denoising_of(pipeline)
    method.denoiser = oracle
    texts = (torch.zeros(2, 5, 32), torch.zeros(2, 32), torch.zeros(5, 3)) if kind == "flow" else torch.zeros(2, 77, 32)
    assert float(method.loss(latents, texts, noise, uniform)) == pytest.approx(0, abs=1e-12)
    if kind == "flow":
        noisy, times = oracle.given["hidden_states"], oracle.given["timestep"]
        assert times.tolist() == pytest.approx(
            [1 / (1 + math.exp(-NormalDist().inv_cdf(u))) for u in (0.2, 0.7)], rel=1e-5
        )
        back = noisy - times.view(-1, 1, 1) * oracle.prediction  # one Euler step to time 0
        torch.testing.assert_close(back, packed(latents), atol=1e-5, rtol=1e-5)
        assert oracle.given["guidance"].tolist() == [1.0, 1.0]
        return
    pipeline.scheduler.set_timesteps(1000)
    for row in range(2):
        step = int(oracle.given["timestep"][row])
        back = pipeline.scheduler.step(oracle.prediction[row], step, oracle.given["sample"][row]).pred_original_sample
        torch.testing.assert_close(back, latents[row], atol=1e-4, rtol=1e-4)


def test_bad_data_is_named(tmp_path: Path, pairs: Path) -> None:
    with pytest.raises(DatasetError, match="captions.jsonl does not exist"):
        read_captions(tmp_path)
    path = tmp_path / "captions.jsonl"
    for content, said in (
        ("", "holds no pictures"),
        ("{\n", "line 1"),
        ('{"image": 3, "caption": "a"}\n', "line 1"),
        ('{"image": "../x.png", "caption": "a"}\n', "not a path inside"),
        ('{"image": "x.png", "caption": "a"}\n', "x.png"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DatasetError, match=re.escape(said)):
            read_captions(tmp_path)


def test_bad_flags_are_one_line(
    train: Callable[..., int], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, status, said in (
        (["--height", "40"], 2, "multiples of 16"),
        (["--batch-size", "17"], 2, "lower the batch size"),
        (["--model", str(models / "clip")], 2, "model_index.json"),
        (["--learning-rate", "1e30"], 1, "not a finite number"),
    ):
        out = tmp_path / said.split()[0]
        assert train(out, *flags) == status
        shown = capsys.readouterr().err
        assert said in shown and "Traceback" not in shown
        assert not (out / WEIGHTS).exists()


def test_an_image_that_cannot_be_read(
    pairs: Path, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(pairs, tmp_path / "pairs"))
    image = sorted(data.glob("images/*.png"))[1]
    image.write_bytes(b"")
    assert train(tmp_path / "lora", "--data", str(data)) == 2
    assert str(image) in capsys.readouterr().err
    assert train(tmp_path / "lora", "--data", str(data), "--bad-images", "skip") == 0
    shown = capsys.readouterr().out
    assert shown.count("the next item takes their place") == 1 and str(image) in shown


def test_a_damaged_state_is_named(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "lora", "--steps", "3") == 0
    state = tmp_path / "lora" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:200])
    assert train(tmp_path / "lora") == 2
    assert "training_state.pt" in capsys.readouterr().err


def test_another_family_is_refused(models: Path, train: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(models / "sd", tmp_path / "model"))
    index = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(index | {"prediction_type": "sample"}))
    assert train(tmp_path / "lora", "--model", str(folder)) == 2
    assert "Stable Diffusion 1 and 2 and for Flux" in capsys.readouterr().err


def two_processes(flags: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fafa.syncpr"]
    return subprocess.run([*launch, *flags], capture_output=True, text=True, timeout=400, env=environment)


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_twice_the_batch(
    train: Callable[..., int], train_flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert train(tmp_path / "one", "--steps", "3") == 0
    done = two_processes(train_flags(tmp_path / "two", "--steps", "3", "--batch-size", "2"), dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    # AdamW divides a gradient by its size, so an element whose gradient is rounding noise takes a step of its own: single
    # elements may differ by a part of a step (the sum of three rates: 2.5e-2), whole matrices may not.
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-2 * one[name].norm(), name


@pytest.mark.slow
def test_one_failing_process_ends_the_job(
    train_flags: Callable[..., list[str]], tmp_path: Path, second_process_raises: dict[str, str]
) -> None:
    """Process 1 raises in its second step; the other one sits in a collective that will never end."""
    began = time.monotonic()
    done = two_processes(train_flags(tmp_path / "out", "--batch-size", "2"), second_process_raises)
    assert done.returncode != 0 and time.monotonic() - began < 200
    assert "Traceback" in done.stderr and "rank one is lost" in done.stderr
    assert not (tmp_path / "out" / WEIGHTS).exists()
