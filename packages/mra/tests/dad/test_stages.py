"""The stages on tiny models: what they write, that MRA's training reads it, going on after a kill, shards."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mra.cli import dad_main
from mra.dad import generate
from mra.dad.records import image_of
from tbps_common.datasets import load_processed_train, load_sda

Flags = Callable[..., list[str]]
STEMS = ("generated", "filtered", "captioned", "regions")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_writes_its_records_and_a_manifest(made: Path, pairs: list[str]) -> None:
    names = [f"c_0_5000/{index}_{variant}.jpg" for index in range(3) for variant in range(4)]
    generated = read_lines(made / "work/generated.jsonl")
    assert [record["image"] for record in generated] == names
    captions = load_processed_train(pairs[1], pairs[3]).captions
    assert [record["prompt"] for record in generated if record["variant"] == 0] == captions[:3]
    for stem, before in zip(STEMS, (12, 12, None, None)):
        manifest = json.loads((made / f"work/{stem}.jsonl.manifest.json").read_text())
        records = read_lines(made / f"work/{stem}.jsonl")
        assert manifest["finished"] and manifest["kept"] == len(records)
        assert before is None or manifest["items"] == before
        assert manifest["kept"] + sum(manifest["dropped"].values()) == manifest["items"]
        assert manifest["libraries"].keys() >= {"torch", "transformers"}
    settings = json.loads((made / "work/regions.jsonl.manifest.json").read_text())["settings"]
    assert settings["box_threshold"] == settings["text_threshold"] == 0.35 and settings["model"]


def test_pictures_have_the_asked_size_and_colours(made: Path) -> None:
    spreads = []
    for path in sorted((made / "images").rglob("*.jpg")):
        with Image.open(path) as picture:
            assert picture.size == (32, 64) and picture.mode == "RGB"
            spreads.append(np.asarray(picture).std())
    assert len(spreads) == 12 and min(spreads) > 1


def test_the_result_is_read_by_the_training(made: Path) -> None:
    from mra.config import load_config
    from mra.data import PretrainDataset
    from mra.model.settings import PACKAGE

    config = load_config(PACKAGE / "configs/sda.yaml")
    config["train_file_regions"] = [str(made / "sda" / Path(name).name) for name in config["train_file_regions"]]
    config["image_root"] = str(made / "images")
    data = load_sda(config["train_file_regions"], config["image_root"])
    assert data.n_images == len(data.records) > 0
    summary = json.loads((made / "work/sda.manifest.json").read_text())
    assert summary["pictures"] == len(data.records)
    assert summary["boxes"] == sum(len(record.boxes) for record in data.records) > 0
    stored = json.loads((made / "sda/sda_0_5000.json").read_text())
    assert [list(entry) for entry in stored] == [["image", "boxes", "logits", "phrases", "caption", "image_id"]] * len(
        stored
    )
    assert [entry["image_id"] for entry in stored] == list(range(len(stored)))
    dataset = PretrainDataset(config)
    for number in range(len(dataset)):
        image, caption, _, atts, phrase, _, _ = dataset[number]
        assert image.shape == (3, 224, 224) and caption and phrase and int((atts == 0).sum()) > 0
    assert dataset.bad_boxes == 0


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that does not tell the time of a run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("manifest.json") and "model" not in path.parts
    }


def run_all(flags: Flags, folder: Path, *more: str) -> None:
    for command in ("generate", "filter", "caption", "regions"):
        control = ["--controlnet", str(folder / "model/controlnet")] if command == "generate" else []
        assert dad_main(flags(command, folder, *control, *more)) == 0


def test_a_second_call_loads_no_model_and_changes_nothing(
    copied: Path, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copied)
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    # The manifest names the ControlNet, so the copy is given the first one.
    first = json.loads((copied / "work/generated.jsonl.manifest.json").read_text())["settings"]["controlnet"]
    assert dad_main(flags("generate", copied, "--controlnet", first)) == 0
    for command in ("filter", "caption", "regions"):
        assert dad_main(flags(command, copied)) == 0
    assert contents(copied) == before


def test_killed_stage_goes_on_without_loss_or_repetition(
    made: Path, copied: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied)
    first = json.loads((copied / "work/generated.jsonl.manifest.json").read_text())["settings"]["controlnet"]
    for stem in STEMS:
        path = copied / f"work/{stem}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:5]) + lines[5][:17])  # as a kill in the middle of a write leaves it
        manifest = json.loads((copied / f"work/{stem}.jsonl.manifest.json").read_text())
        (copied / f"work/{stem}.jsonl.manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    for number in range(5, 12):
        (copied / f"images/c_0_5000/{number // 4}_{number % 4}.jpg").unlink()
    assert dad_main(flags("filter", copied)) == 2
    assert "is not finished" in capsys.readouterr().err
    assert dad_main(flags("generate", copied, "--controlnet", first)) == 0
    assert "5 of 12 pictures are there already" in capsys.readouterr().out
    for command in ("filter", "caption", "regions"):
        assert dad_main(flags(command, copied)) == 0
    after = contents(copied)
    assert after.keys() == before.keys()
    for name in before:
        if name.endswith(".jpg"):  # other batches round differently
            assert largest_difference(made / name, copied / name) <= 2
        elif "generated" in name or "filtered" in name:
            assert after[name] == before[name], name


def largest_difference(one: Path, other: Path) -> int:
    with Image.open(one) as left, Image.open(other) as right:
        return int(np.abs(np.asarray(left, np.int16) - np.asarray(right, np.int16)).max())


def test_sigterm_ends_the_stage_after_a_batch(
    tmp_path: Path, flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = generate.draw

    def draw_and_be_asked_to_stop(*arguments: Any) -> list[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return drawn(*arguments)

    monkeypatch.setattr(generate, "draw", draw_and_be_asked_to_stop)
    assert dad_main(flags("generate", tmp_path)) == 143
    assert "8 to do: run the same command again" in capsys.readouterr().out
    monkeypatch.setattr(generate, "draw", drawn)
    assert dad_main(flags("generate", tmp_path)) == 0
    assert len(read_lines(tmp_path / "work/generated.jsonl")) == 12


def test_shards_make_what_one_run_makes(
    made: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    control = ["--controlnet", str(made / "model/controlnet")]
    for shard in ("2/2", "1/2"):
        assert dad_main(flags("generate", tmp_path, *control, "--shard", shard, "--batch_size", "3")) == 0
    for command in ("filter", "caption", "regions"):
        assert dad_main(flags(command, tmp_path, "--shard", "1/2")) == 0
        assert dad_main(flags("regions", tmp_path, "--pack")) == 2  # not all shards are there
        assert dad_main(flags(command, tmp_path, "--shard", "2/2")) == 0
    assert not (tmp_path / "sda").exists()
    capsys.readouterr()
    assert dad_main(flags("regions", tmp_path, "--pack")) == 0
    for path in sorted((made / "images").rglob("*.jpg")):
        assert largest_difference(path, tmp_path / path.relative_to(made)) <= 2
    whole, shared = (
        [image_of(entry) for entry in json.loads((folder / "sda/sda_0_5000.json").read_text())]
        for folder in (made, tmp_path)
    )
    assert shared == whole
    assert dad_main(flags("filter", tmp_path, "--shard", "1/3")) == 2
    assert "use the same number of shards" in capsys.readouterr().err
    # The share that the filter removed is of all shards.
    assert dad_main(flags("filter", tmp_path, "--shard", "2/2")) == 0
    assert " of 12 pictures removed" in capsys.readouterr().out
    # What is left of a division that was given up does not count; shares made with other settings are not joined.
    (tmp_path / "work/regions.1-of-3.jsonl.manifest.json").write_text('{"settings": {}}')
    assert dad_main(flags("regions", tmp_path, "--pack")) == 0
    manifest = tmp_path / "work/regions.2-of-2.jsonl.manifest.json"
    manifest.write_text(manifest.read_text().replace('"box_threshold": 0.35', '"box_threshold": 0.2'))
    assert dad_main(flags("regions", tmp_path, "--pack")) == 2
    assert "regions.2-of-2.jsonl with box_threshold=0.2" in capsys.readouterr().err


def test_other_settings_are_refused(copied: Path, flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copied)
    assert dad_main(flags("generate", copied, "--seed", "1")) == 2
    assert "was begun with" in capsys.readouterr().err
    assert dad_main(flags("regions", copied, "--min_side", "0.1")) == 2
    assert "min_side=0.02" in capsys.readouterr().err
    assert contents(copied) == before
    # So is a stage whose input was made anew.
    path = copied / "work/filtered.jsonl.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["min_extent"] = 0.9
    path.write_text(json.dumps(manifest))
    assert dad_main(flags("caption", copied)) == 2
    assert "input=" in capsys.readouterr().err


def test_low_rank_adapter_and_plain_model_draw_other_pictures(tmp_path: Path, flags: Flags) -> None:
    lora = ("--method", "lora", "--lora_rank", "4", "--lr", "0.05", "--gradient_checkpointing")
    assert dad_main(flags("finetune", tmp_path, *lora)) == 0
    drawn = {}
    for name, more in (("plain", []), ("lora", ["--lora", str(tmp_path / "model/lora")])):
        assert dad_main(flags("generate", tmp_path / name, "--captions", "1", *more)) == 0
        with Image.open(tmp_path / name / "images/c_0_5000/0_0.jpg") as picture:
            drawn[name] = np.asarray(picture, np.int16)
    assert np.abs(drawn["plain"] - drawn["lora"]).max() > 4


# diffusers 0.42 hands a tensor to np.array, of which numpy 2 says that torch must change; users do not see it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_schedulers_draw_the_same_pictures_by_other_ways(tmp_path: Path, flags: Flags) -> None:
    drawn = {}
    for name in ("ddim", "dpm", "unipc"):
        more = ("--captions", "1", "--variants", "1", "--steps", "12", "--scheduler", name)
        assert dad_main(flags("generate", tmp_path / name, *more)) == 0
        with Image.open(tmp_path / name / "images/c_0_5000/0_0.jpg") as picture:
            drawn[name] = np.asarray(picture, np.float64)
    for name in ("dpm", "unipc"):
        assert 0 < np.abs(drawn[name] - drawn["ddim"]).mean() < 30, name


@pytest.mark.slow
def test_sigkill_loses_and_repeats_no_picture(
    made: Path, tmp_path: Path, flags: Flags, kill_when_changed: Callable[..., None]
) -> None:
    control = ("--controlnet", str(made / "model/controlnet"), "--batch_size", "2")
    words = flags("generate", tmp_path, *control)
    journal = tmp_path / "work/generated.jsonl"

    def pictures() -> int:
        return len(list(tmp_path.glob("images/*/*.jpg")))

    def records() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    kill_when_changed(dad_main, words, [pictures, records, pictures], ["mra.dad.generate", "diffusers", "transformers"])
    written = records()
    assert 1 <= written < 12
    assert dad_main(words) == 0
    assert read_lines(journal) == read_lines(made / "work/generated.jsonl")
    for path in made.glob("images/*/*.jpg"):
        assert largest_difference(path, tmp_path / path.relative_to(made)) <= 2


def test_sixteen_bits(tmp_path: Path, flags: Flags) -> None:
    """The frozen parts in bfloat16, what is trained and written in float32."""
    assert dad_main(flags("finetune", tmp_path, "--precision", "bf16")) == 0
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "model/controlnet/diffusion_pytorch_model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}
    losses = [line["loss"] for line in read_lines(tmp_path / "model/log.jsonl")]
    assert all(0 < loss < 5 for loss in losses)
    control = ("--controlnet", str(tmp_path / "model/controlnet"), "--captions", "1", "--precision", "bf16")
    assert dad_main(flags("generate", tmp_path, *control, "--scheduler", "ddim")) == 0
    assert len(list(tmp_path.rglob("*.jpg"))) == 4


def test_unreadable_and_greyscale_pictures_are_dropped_with_their_reason(
    copied: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied / "images/c_0_5000"
    (folder / "0_0.jpg").write_bytes(b"")
    Image.new("RGB", (32, 64), (90, 90, 90)).save(folder / "1_2.jpg")
    for path in (copied / "work").glob("filtered*"):
        path.unlink()
    assert dad_main(flags("filter", copied, "--pose_model", "none")) == 0
    reasons = {entry["image"]: entry["reason"] for entry in read_lines(copied / "work/filtered.jsonl.dropped.jsonl")}
    assert reasons["c_0_5000/0_0.jpg"] == "cannot be read"
    assert reasons["c_0_5000/1_2.jpg"] == "greyscale"
    share = 100 * len(reasons) / 12
    assert f"{len(reasons)} of 12 pictures removed: {share:.2f} % (SDA: 10.63 %)" in capsys.readouterr().out


def test_a_picture_that_became_unreadable_is_dropped_by_later_stages(copied: Path, flags: Flags) -> None:
    for path in (*(copied / "work").glob("captioned*"), *(copied / "work").glob("regions*")):
        path.unlink()
    names = [record["image"] for record in read_lines(copied / "work/filtered.jsonl")]
    for stem, command, name in (("captioned", "caption", names[1]), ("regions", "regions", names[2])):
        (copied / "images" / name).write_bytes(b"")
        assert dad_main(flags(command, copied)) == 0
        dropped = read_lines(copied / f"work/{stem}.jsonl.dropped.jsonl")
        assert [(entry["image"], entry["reason"]) for entry in dropped] == [(name, "cannot be read")]
    kept = [record["image"] for record in json.loads((copied / "sda/sda_0_5000.json").read_text())]
    assert kept == [names[0], *names[3:]]


def test_a_picture_is_written_whole_and_without_listing_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.new("RGB", (32, 64), (200, 30, 30))
    path = tmp_path / "c_0_5000/0_0.jpg"
    path.parent.mkdir()
    (path.parent / ".0_0.tmp.jpg").write_bytes(b"left by a kill")
    with monkeypatch.context() as patched:
        for listing in ("listdir", "scandir"):
            patched.setattr(os, listing, lambda *_: pytest.fail("a folder of 100,000 pictures would be listed"))
        generate.write_picture(picture, path, 95)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="0_0.jpg"):
        generate.write_picture(picture, path, 10)
    assert [entry.name for entry in path.parent.iterdir()] == ["0_0.jpg"] and path.read_bytes() == before


def test_pictures_of_weights_that_were_trained_further_are_not_mixed(
    made: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "model/controlnet", tmp_path / "controlnet")
    words = flags("generate", tmp_path, "--captions", "1", "--controlnet", str(tmp_path / "controlnet"))
    assert dad_main(words) == 0
    weights = tmp_path / "controlnet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert dad_main(words) == 2
    assert "was begun with adapter_weights=" in capsys.readouterr().err


def test_pictures_that_are_no_numbers_are_dropped(
    tmp_path: Path, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = generate.load_pipeline

    def load_broken(*arguments: Any) -> Any:
        import torch

        pipeline = load(*arguments)
        with torch.no_grad():
            pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
        return pipeline

    monkeypatch.setattr(generate, "load_pipeline", load_broken)
    assert dad_main(flags("generate", tmp_path, "--captions", "1")) == 0
    manifest = json.loads((tmp_path / "work/generated.jsonl.manifest.json").read_text())
    assert manifest["kept"] == 0 and manifest["dropped"] == {"not a finite picture": 4}
    assert not list(tmp_path.rglob("*.jpg"))


def test_released_files_are_never_replaced(
    copied: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    released = tmp_path / "other"
    (released / "images/c_0_5000").mkdir(parents=True)
    (released / "images/c_0_5000/0_0.jpg").write_bytes(b"released")
    assert dad_main(flags("generate", released)) == 2
    assert "would be drawn over: give another --images" in capsys.readouterr().err
    (copied / "work/sda.manifest.json").unlink()
    before = contents(copied)
    assert dad_main(flags("regions", copied)) == 2
    assert "give another --sda" in capsys.readouterr().err
    assert contents(copied) == before
