"""fafa-syncpr images: any pipeline of diffusers, pictures that depend on their own seed, halves, shards, kills."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from fafa.cli import syncpr_main
from fafa.syncpr.denoising import denoising_of
from fafa.syncpr.images import cut_in_two, picture_paths
from fafa.syncpr.lora import add_lora, save_lora
from fafa.syncpr.records import load_pairs
from fafa.syncpr.text_to_image import Sampling, TextToImage, load_lora, load_pipeline
from tbps_common.errors import InputError
from tbps_common.pipeline.stages import read_stage

SMALL = Sampling(32, 32, 2, 3.5)


def painter(models: Path, kind: str) -> TextToImage:
    return TextToImage(load_pipeline(str(models / kind), None, torch.float32), torch.device("cpu"))


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema())


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_picture_depends_on_prompt_and_seed_not_on_its_batch(models: Path, kind: str) -> None:
    engine = painter(models, kind)
    together = engine.paint(["a man in red", "a woman in blue", "a man in red"], [1, 2, 3], SMALL)
    alone = engine.paint(["a woman in blue"], [2], SMALL)
    assert all(picture is not None and picture.size == (32, 32) for picture in together)
    assert largest_difference(together[1], alone[0]) <= 1  # type: ignore[arg-type]
    assert largest_difference(together[0], together[2]) > 5  # type: ignore[arg-type]


def test_prompts_beyond_the_text_encoder_are_noticed(models: Path) -> None:
    short = painter(models, "sd")
    assert (short.longest_prompt, short.is_cut("a man " * 30), short.is_cut("a man " * 40)) == (77, False, True)
    assert painter(models, "flux").longest_prompt == 512  # the second encoder reads on where CLIP stops


def test_a_batch_that_does_not_fit_is_halved(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = painter(models, "sd")
    whole = engine.paint(["a", "b", "c", "d"], [1, 2, 3, 4], SMALL)
    sizes: list[int] = []
    paint = TextToImage.paint_at_once

    def hungry(self: TextToImage, prompts: Sequence[str], *more: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return paint(self, prompts, *more)

    monkeypatch.setattr(TextToImage, "paint_at_once", hungry)
    parts = engine.paint(["a", "b", "c", "d"], [1, 2, 3, 4], SMALL)
    assert sizes == [4, 2, 2]
    assert all(largest_difference(one, other) <= 1 for one, other in zip(whole, parts))  # type: ignore[arg-type]


def test_halves_are_cut_in_the_middle_and_resized() -> None:
    whole = Image.new("RGB", (64, 64), "red")
    whole.paste("blue", (32, 0, 64, 64))
    left, right = cut_in_two(whole, 384, 192)
    assert left.size == right.size == (192, 384)
    assert left.getextrema() == ((255, 255), (0, 0), (0, 0)) and right.getextrema() == ((0, 0), (0, 0), (255, 255))
    assert picture_paths(42, 0, 21) == {
        "whole": "test3/img/42-0.png",
        "left": "test3/sub_img/img_left/42-0_left.png",
        "right": "test3/sub_img/img_right/42-0_right.png",
    }


def test_stage_writes_pictures_halves_and_records(pictured: Path) -> None:
    records = load_pairs(pictured, "images")
    assert [(record["quadruple_id"], record["variant"]) for record in records] == [
        (number, variant) for number in range(6) for variant in range(2)
    ]
    for record in records:
        folder = f"test{1 + record['quadruple_id'] // 4}"
        name = f"{record['quadruple_id']}-{record['variant']}"
        assert record["left"] == f"{folder}/sub_img/img_left/{name}_left.png"
        with Image.open(pictured / f"{folder}/img/{name}.png") as whole:
            left, right = cut_in_two(whole, 32, 16)
        for side, half in (("left", left), ("right", right)):
            with Image.open(pictured / record[side]) as stored:
                assert stored.size == (16, 32) and largest_difference(stored, half) == 0
    assert len({record["seed"] for record in records}) == 12
    manifest = json.loads((pictured / "images.1-of-2.jsonl.manifest.json").read_text(encoding="utf-8"))
    assert manifest["finished"] and manifest["kept"] == 6 and manifest["settings"]["steps"] == 2
    assert manifest["cut_prompts"] == 3  # the tiny Stable Diffusion reads 77 tokens, and the prompts are longer


def test_one_machine_makes_the_pictures_of_two(
    pictured: Path, tmp_path: Path, image_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(pictured / "quadruples.jsonl", tmp_path)
    flags = ["images", "--out", str(tmp_path), *image_flags, "--batch-size", "5", "--halves-only"]
    assert syncpr_main(flags) == 0
    assert "more than the 77 tokens" in capsys.readouterr().out
    assert read_stage(tmp_path, "images") == load_pairs(pictured, "images")
    for record in load_pairs(pictured, "images"):
        with Image.open(tmp_path / record["left"]) as one, Image.open(pictured / record["left"]) as other:
            assert largest_difference(one, other) <= 1
    assert not list(tmp_path.glob("test*/img"))


def test_a_killed_run_loses_and_repeats_nothing(
    pictured: Path, tmp_path: Path, image_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(pictured / "quadruples.jsonl", tmp_path)
    painted: list[int] = []
    paint = TextToImage.paint

    def mortal(self: TextToImage, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Any:
        if len(painted) == 6:
            raise KeyboardInterrupt
        painted.extend(seeds)
        return paint(self, prompts, seeds, sampling)

    monkeypatch.setattr(TextToImage, "paint", mortal)
    flags = ["images", "--out", str(tmp_path), *image_flags]
    assert syncpr_main(flags) == 130
    assert len((tmp_path / "images.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    painted.append(0)
    assert syncpr_main(flags) == 0
    assert len(painted) == 13 and len(set(painted)) == 13
    assert read_stage(tmp_path, "images") == load_pairs(pictured, "images")


def test_quadruples_that_come_later_move_no_picture_to_another_shard(
    pictured: Path, tmp_path: Path, image_flags: list[str]
) -> None:
    # The first request had no usable answer at first, and has one when the texts are made again for more of them.
    lines = (pictured / "quadruples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for present in (lines[1:4], lines):
        (tmp_path / "quadruples.jsonl").write_text("".join(present), encoding="utf-8")
        for shard in ("1/2", "2/2"):
            assert syncpr_main(["images", "--out", str(tmp_path), *image_flags, "--shard", shard]) == 0
    assert load_pairs(tmp_path, "images") == load_pairs(pictured, "images")


@pytest.mark.slow
def test_sigkill_loses_and_repeats_no_picture(
    pictured: Path, tmp_path: Path, image_flags: list[str], kill_when_changed: Callable[..., None]
) -> None:
    shutil.copy(pictured / "quadruples.jsonl", tmp_path)

    def pictures() -> int:
        return len(list(tmp_path.glob("test*/**/*.png")))

    def records() -> int:
        journal = tmp_path / "images.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    flags = ["images", "--out", str(tmp_path), *image_flags]
    preload = ["fafa.syncpr.text_to_image", "diffusers", "transformers"]
    kill_when_changed(syncpr_main, flags, [pictures, records, pictures], preload)
    assert 1 <= records() < 12
    assert syncpr_main(flags) == 0
    assert read_stage(tmp_path, "images") == load_pairs(pictured, "images")
    for record in load_pairs(pictured, "images"):
        with Image.open(tmp_path / record["left"]) as one, Image.open(pictured / record["left"]) as other:
            assert largest_difference(one, other) <= 1


def test_useless_pictures_are_dropped_with_the_reason(
    pictured: Path, tmp_path: Path, image_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(pictured / "quadruples.jsonl", tmp_path)

    def paint(self: TextToImage, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Any:
        noise = Image.effect_noise((32, 32), 60).convert("RGB")
        return [(None, Image.new("RGB", (32, 32)), noise)[place % 3] for place in range(len(prompts))]

    monkeypatch.setattr(TextToImage, "paint", paint)
    assert syncpr_main(["images", "--out", str(tmp_path), *image_flags]) == 0
    manifest = json.loads((tmp_path / "images.jsonl.manifest.json").read_text(encoding="utf-8"))
    assert manifest["kept"] == 4
    assert manifest["dropped"] == {"a picture of one colour": 4, "blanked by the model's safety checker": 4}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--height", "36"], "multiple of 8"),
        (["--width", "64"], "choose --width 32"),
        (["--prompt-template", "{caption_2} {caption_1}"], "--prompt-template"),
        (["--model", "absent/folder/of/model"], "absent/folder/of/model"),
        (["--lora", "./absent.safetensors"], "--lora"),
        (["--device", "tpu"], "--device tpu"),
        (["--negative-prompt", "blurred", "--model", "FLUX"], "takes none"),
    ],
)
def test_bad_flags_are_one_line(
    copy_of_pictured: Path, models: Path, image_flags: list[str], flags: list[str], said: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if "FLUX" in flags:
        parameters = dict.fromkeys(("prompt", "generator", "height", "width"))
        load = TextToImage.__init__

        def without_negative(self: TextToImage, *given: Any) -> None:
            load(self, *given)
            self._parameters = parameters  # type: ignore[assignment]

        monkeypatch.setattr(TextToImage, "__init__", without_negative)
        flags = flags[:2]
    for path in copy_of_pictured.glob("images*"):
        path.unlink()
    assert syncpr_main(["images", "--out", str(copy_of_pictured), *image_flags, *flags]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown


@pytest.mark.parametrize("damage", ["empty", "truncated", "another model's", "text"])
def test_loras_that_cannot_be_used_are_one_line(
    copy_of_pictured: Path, image_flags: list[str], damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "lora.safetensors"
    save_file({"unet.nowhere.to_q.lora_A.weight": torch.ones(2, 3)}, path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": content[:-4], "text": b"hello", "another model's": content}[damage])
    for old in copy_of_pictured.glob("images*"):
        old.unlink()
    assert syncpr_main(["images", "--out", str(copy_of_pictured), *image_flags, "--lora", str(path)]) == 2
    shown = capsys.readouterr().err
    assert f"--lora {path}" in shown and shown.count("\n") == 1
    assert not list(copy_of_pictured.glob("images*"))


@pytest.fixture(scope="module")
def lora(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of random matrices for the tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("lora")
    method = denoising_of(load_pipeline(str(models / "sd"), None, torch.float32))
    with torch.no_grad():
        for parameter in add_lora(method, 2, 0).values():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    save_lora(method, folder)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("names of an adapter", "does not use"),
        ("a part of another model", "nowhere"),
        ("not finite", "not finite"),
        ("zero", "changes nothing"),
    ],
)
def test_a_lora_without_full_effect_is_refused(
    models: Path, lora: Path, change: str, said: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(lora)
    load_lora(load_pipeline(str(models / "sd"), None, torch.float32), str(lora), 1.0)  # as it is, it fits
    first = next(iter(tensors))
    if change == "names of an adapter":
        tensors = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    elif change == "a part of another model":
        for end in ("lora_A.weight", "lora_B.weight"):
            tensors[f"unet.nowhere.to_q.{end}"] = torch.ones(2, 2)
    elif change == "not finite":
        tensors[first][0, 0] = float("nan")
    else:
        tensors = {name: torch.zeros_like(value) for name, value in tensors.items()}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match=said):
        load_lora(load_pipeline(str(models / "sd"), None, torch.float32), str(path), 1.0)


def test_models_that_cannot_be_used_are_one_line(
    copy_of_pictured: Path, models: Path, image_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(models / "sd", tmp_path / "broken"))
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    for model in (broken, models / "clip", tmp_path):
        assert syncpr_main(["images", "--out", str(copy_of_pictured), *image_flags, "--model", str(model)]) == 2
        shown = capsys.readouterr().err
        assert f"--model {model}" in shown and shown.count("\n") == 1


def test_missing_libraries_and_models_that_nobody_has_are_one_line(
    copy_of_pictured: Path, image_flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["images", "--out", str(copy_of_pictured), *image_flags]
    assert syncpr_main([*command, "--model", "nobody/nothing"]) == 2  # the tests run without a network
    shown = capsys.readouterr().err
    assert "--model nobody/nothing" in shown and shown.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert syncpr_main(command) == 2
    shown = capsys.readouterr().err
    assert "diffusers, transformers" in shown and "pip install 'packages/fafa[syncpr]'" in shown


def test_earlier_stages_must_be_there(
    tmp_path: Path, image_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert syncpr_main(["images", "--out", str(tmp_path), *image_flags]) == 2
    assert "quadruples.jsonl does not exist" in capsys.readouterr().err
    (tmp_path / "quadruples.jsonl").write_text('{"id": 0, "caption_1": "A man."}\n', encoding="utf-8")
    assert syncpr_main(["images", "--out", str(tmp_path), *image_flags]) == 2
    assert "quadruple 0 has no text caption_2" in capsys.readouterr().err
    (tmp_path / "quadruples.jsonl").write_text("{\n", encoding="utf-8")
    assert syncpr_main(["images", "--out", str(tmp_path), *image_flags]) == 2
    assert "line 1" in capsys.readouterr().err
