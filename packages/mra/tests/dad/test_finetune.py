"""Fine-tuning: what is trained and what is not, going on after an interruption, and the start at the frozen model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mra.cli import dad_main
from mra.dad import finetune
from mra.dad.denoiser import build_networks
from mra.dad.finetune import Pairs
from tbps_common.datasets import load_processed_train
from tbps_common.pipeline.models import choose_dtype
from tbps_common.run.batches import ItemKey, SeededItems
from tbps_common.run.checkpoint import load_checkpoint_file
from tbps_world.checks import assert_same

Flags = Callable[..., list[str]]


def state(folder: Path) -> dict[str, Any]:
    stored = load_checkpoint_file(folder / "model/last.pth")
    stored["progress"].pop("seconds")
    return stored


@pytest.mark.parametrize("method", ["controlnet", "lora"])
def test_untrained_adapter_changes_nothing_and_the_model_stays_frozen(world: Path, method: str) -> None:
    size = (64, 32)
    networks = build_networks(
        str(world / "models/diffusion"), method, size, torch.device("cpu"), torch.float32, lora_rank=4
    )
    denoiser = networks.denoiser
    assert networks.latent == (4, 16, 8)
    noisy = torch.randn(2, *networks.latent)
    text = networks.text(torch.ones(2, 48, dtype=torch.int64))
    timesteps = torch.tensor([10, 900])
    names = set(denoiser.trained())
    with torch.no_grad():
        with_adapter = denoiser(noisy, timesteps, text)
        if method == "lora":
            denoiser.unet.disable_adapters()
        plain = denoiser.unet(noisy, timesteps, encoder_hidden_states=text).sample
    assert torch.allclose(with_adapter, plain, atol=1e-6)
    assert names and all(("controlnet." if method == "controlnet" else "lora_") in name for name in names)
    assert not any(
        parameter.requires_grad for part in (networks.vae, networks.text_encoder) for parameter in part.parameters()
    )


def test_gradients_reach_the_controlnet_through_the_frozen_decoder(world: Path) -> None:
    networks = build_networks(
        str(world / "models/diffusion"), "controlnet", (64, 32), torch.device("cpu"), torch.float32
    )
    noisy = torch.randn(2, *networks.latent)
    text = networks.text(torch.ones(2, 48, dtype=torch.int64))
    networks.denoiser(noisy, torch.tensor([3, 500]), text).square().mean().backward()
    trained = networks.denoiser.trained()
    zeros = {name for name in trained if "controlnet_down_blocks" in name or "controlnet_mid_block" in name}
    assert zeros
    for name in zeros:
        gradient = trained[name].grad
        assert gradient is not None and float(gradient.abs().max()) > 0, name
    assert all(parameter.grad is None for parameter in networks.denoiser.unet.parameters())


def test_latents_noise_and_target(world: Path) -> None:
    networks = build_networks(str(world / "models/diffusion"), "lora", (64, 32), torch.device("cpu"), torch.float32)
    pixels, noise = torch.rand(2, 3, 64, 32) * 2 - 1, torch.randn(2, *networks.latent)
    posterior = networks.vae.encode(pixels).latent_dist
    expected = (posterior.mean + posterior.logvar.mul(0.5).exp() * noise) * networks.vae.config.scaling_factor
    latents = networks.latents(pixels, noise)
    assert torch.allclose(latents, expected, atol=1e-5)
    steps = torch.tensor([0, 999])
    share = networks.schedule.alphas_cumprod[steps].view(2, 1, 1, 1)
    noisy = networks.schedule.add_noise(latents, noise, steps)
    assert torch.allclose(noisy, share.sqrt() * latents + (1 - share).sqrt() * noise, atol=1e-5)
    assert networks.target(latents, noise, steps) is noise
    networks.schedule.register_to_config(prediction_type="v_prediction")
    velocity = share.sqrt() * noise - (1 - share).sqrt() * latents
    assert torch.allclose(networks.target(latents, noise, steps), velocity, atol=1e-5)


def test_items_hold_picture_caption_and_their_own_noise(world: Path, pairs: list[str]) -> None:
    from transformers import AutoTokenizer

    data = load_processed_train(pairs[1], pairs[3])
    tokenizer = AutoTokenizer.from_pretrained(world / "models/diffusion/tokenizer")
    dataset = SeededItems(Pairs(data, tokenizer, (64, 32), (4, 16, 8), 1000, 0.5))
    first, again, other = (dataset[ItemKey(3, seed)] for seed in (1, 1, 2))
    assert (
        first["pixels"].shape == (3, 64, 32)
        and float(first["pixels"].min()) >= -1
        and float(first["pixels"].max()) <= 1
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], other["noise"]) and not torch.equal(first["noise"], first["encoding_noise"])
    empty = sum(int((dataset[ItemKey(3, seed)]["ids"] != 0).sum()) <= 2 for seed in range(60))
    assert 15 < empty < 45


def test_interrupted_run_goes_on_with_the_same_numbers(
    tmp_path: Path, flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--save_every", "3", "--accumulate", "2", "--empty_prompts", "0.1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert dad_main(flags("finetune", whole, *more)) == 0

    log = finetune.logger.info
    calls = 0

    def log_and_be_stopped(message: str, *values: Any) -> None:
        nonlocal calls
        log(message, *values)
        if message.startswith("step %d, epoch"):
            calls += 1
            if calls == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(finetune.logger, "info", log_and_be_stopped)
    assert dad_main(flags("finetune", parts, *more)) == 143
    monkeypatch.undo()
    assert not (parts / "model/controlnet").exists()
    assert json.loads((parts / "model/manifest.json").read_text())["finished"] is False
    # A log line that a killed run wrote after its last state must not appear twice.
    with open(parts / "model/log.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 99}\n')
    assert dad_main(flags("finetune", parts, *more)) == 0
    assert "resuming from" in capsys.readouterr().out
    assert_same(state(whole), state(parts))
    for name in ("model/log.jsonl", "model/controlnet/diffusion_pytorch_model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    # Once more: nothing is left to do.
    assert dad_main(flags("finetune", parts, *more)) == 0
    assert "the training is finished" in capsys.readouterr().out
    # Killed between the last state of a longer run and its weights: those of the shorter one are not the result.
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "save_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert dad_main(flags("finetune", parts, *more, "--epochs", "2")) == 130
    weights = parts / "model/controlnet/diffusion_pytorch_model.safetensors"
    of_one_epoch = weights.read_bytes()
    assert dad_main(flags("finetune", parts, *more, "--epochs", "2")) == 0
    assert weights.read_bytes() != of_one_epoch
    assert json.loads((parts / "model/manifest.json").read_text())["finished"] is True


@pytest.mark.slow
def test_sigkill_inside_a_save_and_after_it_changes_nothing(
    tmp_path: Path, flags: Flags, kill_when_changed: Callable[..., None]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert dad_main(flags("finetune", whole, "--save_every", "1")) == 0

    def temporary() -> set[Path]:
        return set((parts / "model").glob(".*"))

    def stored() -> int:
        path = parts / "model/last.pth"
        return path.stat().st_mtime_ns if path.exists() else 0

    words = flags("finetune", parts, "--save_every", "1")
    preload = ["mra.dad.finetune", "diffusers", "transformers"]
    kill_when_changed(dad_main, words, [temporary, stored, temporary, stored], preload)
    assert dad_main(words) == 0
    assert_same(state(whole), state(parts))
    for name in ("model/log.jsonl", "model/controlnet/diffusion_pytorch_model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert not temporary()


def test_other_settings_are_refused_on_going_on(made: Path, flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    assert dad_main(flags("finetune", made, "--seed", "7")) == 2
    assert "was begun with seed=42, and this run has seed=7" in capsys.readouterr().err


def test_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = finetune.noise_loss
    monkeypatch.setattr(finetune, "noise_loss", lambda *given: loss(*given) * float("nan"))
    assert dad_main(flags("finetune", tmp_path)) == 1
    assert "the loss of step 1 is not a finite number" in capsys.readouterr().err
    assert not (tmp_path / "model/last.pth").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path, flags: Flags) -> None:
    assert dad_main(flags("finetune", tmp_path / "one", "--batch_size", "8")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "mra.dad"]
    finished = subprocess.run(
        [*command, *flags("finetune", tmp_path / "two", "--batch_size", "4")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name, weights in one["weights"].items():
        assert torch.allclose(weights, two["weights"][name], atol=2e-4), name
    losses = [[json.loads(line)["loss"] for line in stored["progress"]["log"]] for stored in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_one_failing_process_ends_the_job(tmp_path: Path, flags: Flags, second_process_raises: dict[str, str]) -> None:
    """Process 1 raises in its second step; the other one sits in a collective that will never end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "mra.dad"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, *flags("finetune", tmp_path, "--batch_size", "4")],
        capture_output=True,
        text=True,
        env=second_process_raises,
        timeout=300,
    )
    assert done.returncode != 0 and time.monotonic() - began < 200
    assert "Traceback" in done.stderr and "rank one is lost" in done.stderr
    assert not (tmp_path / "model/last.pth").exists()


def test_precision_of_the_frozen_parts() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype("auto", cpu, on_gpu="fp16") is torch.float32
    assert choose_dtype("auto", gpu, on_gpu="fp16") is torch.float16
    assert choose_dtype("bf16", cpu, on_gpu="fp16") is torch.bfloat16
