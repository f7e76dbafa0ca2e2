"""Tiny models: their tokenizer knows the words, their parts have the sizes of the specification."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from dp_gen import encode_with_image_tokens, load_tokenizer
from tbps_world.cli import dp_tiny_main
from tbps_world.tiny.dp_gen import byte_symbols, learn_merges
from tbps_world.tiny.dp_gen_vae import train_images
from tbps_world.tiny.vae import start_as_mean_colours


def test_every_word_becomes_one_token() -> None:
    words = ["coat", "coats", "cat", "a"]
    merges = learn_merges(words)
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            place = 0
            while place < len(symbols) - 1:
                if (symbols[place], symbols[place + 1]) == (left, right):
                    symbols[place : place + 2] = [left + right]
                place += 1
        assert symbols == [word + "</w>"]


def test_the_byte_table_is_clips() -> None:
    symbols = byte_symbols()
    assert len(set(symbols)) == 256 and symbols[0] == "!" and symbols[94] == "¡" and symbols[188] == "Ā"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lexicon = tmp_path / "words.txt"
    lexicon.write_text("a man with brown\nt-shirt coat\n", encoding="utf-8")
    assert dp_tiny_main([str(tmp_path / "out"), "--lexicon", str(lexicon)]) == 0
    folder = tmp_path / "out" / "runwayml" / "stable-diffusion-v1-5"
    tokenizer = load_tokenizer(str(folder))
    ids, mask = encode_with_image_tokens(tokenizer, "A man with brown coat<|image|>")
    assert int(ids[0, 6]) == tokenizer.eos_token_id and mask[0].nonzero()[:, 0].tolist() == [5]
    assert tokenizer.convert_tokens_to_ids("<|image|>") == len(tokenizer) - 1
    assert tokenizer.model_max_length == 77 and tokenizer.pad_token_id == tokenizer.eos_token_id
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert size < 2_000_000
    first = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert dp_tiny_main([str(tmp_path / "again"), "--lexicon", str(lexicon)]) == 0
    assert (
        first
        == (
            tmp_path / "again" / folder.relative_to(tmp_path / "out") / "unet" / "diffusion_pytorch_model.safetensors"
        ).read_bytes()
    )
    capsys.readouterr()
    assert dp_tiny_main([str(tmp_path / "no"), "--lexicon", str(tmp_path / "absent")]) == 2
    assert "--lexicon" in capsys.readouterr().err


def test_a_vae_of_mean_colours(tiny_models: Path, training_folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_models / "runwayml" / "stable-diffusion-v1-5" / "vae")
    images = train_images(training_folder, 64)
    start_as_mean_colours(vae)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        means = torch.nn.functional.avg_pool2d(images, 8)
        for colour in range(3):  # GroupNorm has scaled each colour of each image, and no more
            both = torch.stack([posterior.mean[:, colour].flatten(1), means[:, colour].flatten(1)])
            ratio = (both[0] * both[1]).sum(1) / (both[1] * both[1]).sum(1)
            assert torch.allclose(both[0], both[1] * ratio[:, None], atol=1e-4) and (ratio > 0).all()
        painted = vae.decode(posterior.mean).sample
        assert torch.allclose(
            painted, painted[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3), atol=1e-3
        )


def test_the_vae_learns(tmp_path: Path, training_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--vae_images", str(training_folder), "--vae_resolution", "64", "--vae_updates"]
    errors = []
    for updates in ("1", "40"):
        assert dp_tiny_main([str(tmp_path / updates), *flags, updates]) == 0
        said = next(line for line in capsys.readouterr().out.splitlines() if "mean squared error" in line)
        errors.append(float(said.split(": ")[1].split()[0]))
    assert errors[1] < 0.5 * errors[0]
    vae = AutoencoderKL.from_pretrained(tmp_path / "40" / "runwayml" / "stable-diffusion-v1-5" / "vae")
    with torch.no_grad():
        latents = vae.encode(train_images(training_folder, 64)).latent_dist.mean * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1, abs=1e-3)


def test_unusable_flags_of_the_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dp_tiny_main([str(tmp_path / "o"), "--vae_images", str(tmp_path / "absent")]) == 2
    assert dp_tiny_main([str(tmp_path / "o"), "--vae_images", str(tmp_path), "--vae_resolution", "100"]) == 2
    assert "--vae_resolution" in capsys.readouterr().err and not (tmp_path / "o").exists()
