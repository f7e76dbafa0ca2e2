"""generate.py with a tiny random model: new persons, edits, resume, geometry, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dp_gen.generate import main
from dp_gen.generation.geometry import Square, at_latent_size, dilate, feather, paste, to_square
from dp_gen.generation.references import read_pool, rewrite
from dp_gen.generation.sampling import denoise, edit, last_timesteps
from tbps_world.cli import synth_main

PACKAGE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A final folder as train.py leaves it, with random weights, for pictures of 64 x 64."""
    from dp_gen import DiversePersonPipeline, parse_args
    from tbps_world.tiny.dp_gen import read_lexicon, write_tiny_models

    root = tmp_path_factory.mktemp("models")
    write_tiny_models(root, read_lexicon(None), 0)
    args = parse_args(default=True)
    args.pretrained_model_hf = str(root / "runwayml" / "stable-diffusion-v1-5")
    args.image_encoder_hf = str(root / "openai" / "clip-vit-large-patch14")
    args.resolution, args.MAX_REFERENCE_ATTRIBUTE_NUM = 64, 3
    DiversePersonPipeline.from_args(args).save_pretrained(root / "trained")
    return root / "trained"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder of the synthetic world, with the persons of its samples."""
    root = tmp_path_factory.mktemp("world")
    assert synth_main(["--out", str(root), "--preset", "tiny", "--ids", "6", "--layouts", "dp"]) == 0
    ids = (root / "dp" / "img_ids.txt").read_text().split()
    lines = [json.dumps({"id": name, "person": 1 + number // 4}) + "\n" for number, name in enumerate(ids)]
    (root / "dp" / "meta.jsonl").write_text("".join(lines), encoding="utf-8")
    return root / "dp"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference images of three garments and one hair."""
    root = tmp_path_factory.mktemp("pool")
    for name, colour in {
        "uppercloth/red_coat.png": (200, 20, 20),
        "uppercloth/white_shirt_2.jpg": (240, 240, 240),
        "bottomcloth/green_skirt.png": (10, 160, 40),
        "hair/gold_hair.png": (220, 180, 60),
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 60), colour).save(root / name)
    return root


def quick(trained: Path, out: Path) -> list[str]:
    """Flags of a short run."""
    return ["--finetuned_model_path", str(trained), "--out", str(out), "--inference_steps", "3", "--device", "cpu"]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "edits.jsonl").read_text(encoding="utf-8").splitlines()]


def test_new_persons_with_references(trained: Path, pool: Path, tmp_path: Path) -> None:
    references = tmp_path / "references"
    for number, source in (("10", "bottomcloth/green_skirt.png"), ("2", "hair/gold_hair.png")):
        (references / number).mkdir(parents=True)
        (references / number / "a.png").write_bytes((pool / source).read_bytes())
    text = "a woman with gold hair<|image|> and a green skirt<|image|>"
    flags = ["--test_description", text, "--test_reference_attribute_folder", str(references)]
    flags += ["--num_images_per_description", "3", "--seed", "5"]
    assert main([*quick(trained, tmp_path / "a"), *flags, "--generation_batch_size", "2"]) == 0
    found = rows(tmp_path / "a")
    assert [row["file"] for row in found] == ["output_0.png", "output_1.png", "output_2.png"]
    assert found[0]["references"] == [str(references / "2" / "a.png"), str(references / "10" / "a.png")]
    assert found[0]["base_description"] == "a woman with gold hair and a green skirt"
    assert found[0]["reference_attribute_list"] == ["gold hair", "a green skirt"]
    pictures = [np.array(Image.open(tmp_path / "a" / row["file"])) for row in found]
    assert all(picture.shape == (64, 64, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    # The same number gives the same image in another batch, and alone.
    assert main([*quick(trained, tmp_path / "b"), *flags, "--generation_batch_size", "1"]) == 0
    for row, picture in zip(found, pictures):
        other = np.array(Image.open(tmp_path / "b" / row["file"]))
        assert np.abs(other.astype(int) - picture.astype(int)).max() <= 1  # float sums in another order
    with Image.open(tmp_path / "a" / "contact_sheet.png") as sheet:
        assert sheet.height > 3 * 128


def test_from_python(trained: Path, pool: Path) -> None:
    from dp_gen import DiversePersonPipeline
    from dp_gen.generation import NewTask, Producer, Sampling

    producer = Producer(DiversePersonPipeline.from_pretrained(trained), Sampling(steps=2))
    tasks = [NewTask("a man with gold hair<|image|>", (pool / "hair" / "gold_hair.png",), seed) for seed in (0, 1)]
    images = producer.new([*tasks, NewTask("a man")])
    assert [image.size for image in images] == [(64, 64)] * 3
    assert len({image.tobytes() for image in images}) == 3


def test_references_change_the_picture_and_delay_changes_it_too(trained: Path, pool: Path, tmp_path: Path) -> None:
    def make(name: str, *flags: str) -> np.ndarray:
        listed = tmp_path / f"{name}.jsonl"
        (tmp_path / f"{name}.png").write_bytes((pool / f"{flags[0]}").read_bytes())
        row = {"description": "a man with red coat<|image|>", "references": [f"{name}.png"]}
        listed.write_text(json.dumps(row), encoding="utf-8")
        out = tmp_path / name
        assert main([*quick(trained, out), "--descriptions", str(listed), *flags[1:]]) == 0
        return np.array(Image.open(out / "output_0.png")).astype(int)

    merge = ["--start_merge_step", "-1"]
    red = make("red", "uppercloth/red_coat.png", *merge)
    assert np.abs(red - make("gold", "hair/gold_hair.png", *merge)).max() > 0
    assert np.abs(red - make("late", "uppercloth/red_coat.png", "--start_merge_step", "1")).max() > 0
    never = ["--start_merge_step", "99"]  # the caption alone: the reference has no effect
    assert np.array_equal(make("n1", "uppercloth/red_coat.png", *never), make("n2", "hair/gold_hair.png", *never))


def test_edits_change_the_region_only_and_are_listed(trained: Path, folder: Path, pool: Path, tmp_path: Path) -> None:
    flags = ["--edit_folder", str(folder), "--reference_pool", str(pool), "--edit_labels", "uppercloth", "--limit", "5"]
    assert main([*quick(trained, tmp_path / "out"), *flags, "--num_images_per_description", "2"]) == 0
    found = rows(tmp_path / "out")
    assert 2 <= len(found) <= 10 and len({row["seed"] for row in found}) == len(found)
    for row in found:
        stem = folder / row["source"][:5] / row["source"]
        before = np.array(Image.open(stem.with_suffix(".png"))).astype(int)
        after = np.array(Image.open(tmp_path / "out" / row["file"])).astype(int)
        mask = np.load(stem.with_suffix(".npy")) == 2
        assert after.shape == before.shape and row["labels"] == ["uppercloth"]
        far = ~np.array(Image.fromarray(mask).resize(mask.shape[::-1]))
        ys, xs = np.nonzero(mask)
        far[max(0, ys.min() - 12) : ys.max() + 13, max(0, xs.min() - 12) : xs.max() + 13] = False
        difference = np.abs(after - before)
        assert difference[far].mean() < 3  # JPEG only
        assert difference[mask].mean() > 2 * difference[far].mean()
        info = json.loads(stem.with_suffix(".json").read_text())
        assert row["base_description"] == row["caption"] == info["description"]
        assert row["reference_attribute_list"][0] in ("red coat", "white shirt")
        assert row["person"] == 1 + int(row["source"]) // 4
    # annotate.py reads it as it is
    from dp_gen.annotate import read_rows

    annotatable, problems = read_rows(tmp_path / "out" / "edits.jsonl", 0, -1)
    assert len(annotatable) == len(found) and not problems


def test_edits_are_annotated_and_packed_as_they_are(
    trained: Path, folder: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate.py, annotate.py and dp-pack on each other's files, the chat model replaced by the rule of the practice server."""
    from dp_gen.annotate import main as annotate
    from dp_gen.assemble import main as pack
    from tbps_common.datasets import CUHKPEDES
    from tbps_world.practice.captions import answer
    from tbps_world.practice.server import PracticeServer

    monkeypatch.setenv("OPENAI_API_KEY", "none-needed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    edits, annotations = tmp_path / "edits", tmp_path / "annotations.jsonl"
    flags = ["--edit_folder", str(folder), "--reference_pool", str(pool), "--limit", "6"]
    assert main([*quick(trained, edits), *flags]) == 0
    with PracticeServer(answer) as server:
        command = ["--origin_path", str(edits / "edits.jsonl"), "--output_path", str(annotations)]
        assert annotate([*command, "--base_url", server.url]) == 0
    packed = ["--generated", str(edits), "--annotations", str(annotations), "--out", str(tmp_path / "packed")]
    assert pack(packed) == 0
    records = CUHKPEDES(tmp_path / "packed", verbose=False).train_annos
    made = rows(edits)
    assert len(records) == len(made) >= 4
    for record, row in zip(records, made):
        assert record["id"] == row["person"] and record["file_path"] == f"generated/{Path(row['file']).name}"
        assert record["captions"] != [row["base_description"]]
        assert all(phrase in record["captions"][0] for phrase in row["reference_attribute_list"])


def test_a_phrase_beyond_the_longest_text_is_left_out(
    trained: Path, folder: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "folder")
    names = (folder / "img_ids_train.txt").read_text().split()
    for name in names:  # "hair" early, "uppercloth" after the 77th token
        path = tmp_path / "folder" / name[:5] / f"{name}.json"
        info = json.loads(path.read_text())
        info["description"] = "black hair " + "and so on " * 40 + "a coat"
        box = [2, 2, 20, 40]
        ends = {"hair": 10, "uppercloth": len(info["description"])}
        info["segments"] = [
            {"id": n, "label": label, "bbox": box, "end": end} for n, (label, end) in enumerate(ends.items(), 1)
        ]
        path.write_text(json.dumps(info))
    flags = ["--edit_folder", str(tmp_path / "folder"), "--reference_pool", str(pool), "--limit", "2"]
    assert main([*quick(trained, tmp_path / "both"), *flags, "--edit_labels", "hair", "uppercloth"]) == 0
    assert [row["labels"] for row in rows(tmp_path / "both")] == [["hair"]] * 2
    assert main([*quick(trained, tmp_path / "none"), *flags, "--edit_labels", "uppercloth"]) == 2
    shown = capsys.readouterr()
    assert "2 edits are left out" in shown.out and "no edit is left" in shown.err


@pytest.mark.slow
def test_a_killed_run_goes_on_and_an_image_depends_on_its_number_alone(
    trained: Path, folder: Path, pool: Path, tmp_path: Path
) -> None:
    flags = ["--edit_folder", str(folder), "--reference_pool", str(pool), "--generation_batch_size", "1"]
    flags += ["--limit", "8", "--edit_caption", "substituted"]
    assert main([*quick(trained, tmp_path / "whole"), *flags]) == 0
    whole = rows(tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, "generate.py", *quick(trained, tmp_path / "killed"), *flags],
        cwd=PACKAGE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(list((tmp_path / "killed").glob("imgs/*.jpg"))) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert main([*quick(trained, tmp_path / "killed"), *flags]) == 0
    assert rows(tmp_path / "killed") == whole and len(whole) >= 6
    for row in whole:
        assert (tmp_path / "killed" / row["file"]).read_bytes() == (tmp_path / "whole" / row["file"]).read_bytes()
    assert any(row["caption"] != row["base_description"] for row in whole)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_batch_and_the_same_command_goes_on(
    number: int,
    status: int,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import dp_gen.generation.run

    save = dp_gen.generation.run.save_image

    def save_and_signal(image: Image.Image, path: Path) -> None:
        save(image, path)
        os.kill(os.getpid(), number)

    flags = [*quick(trained, tmp_path), "--test_description", "a man", "--num_images_per_description", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(dp_gen.generation.run, "save_image", save_and_signal)
        assert main([*flags, "--generation_batch_size", "1"]) == status
    assert [row["file"] for row in rows(tmp_path)] == ["output_0.png"]
    assert "to make the missing images" in capsys.readouterr().err and not (tmp_path / "contact_sheet.png").exists()
    assert main(flags) == 0
    assert [row["file"] for row in rows(tmp_path)] == [f"output_{n}.png" for n in range(4)]


def test_shards_make_together_what_one_run_makes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--test_description", "a man", "--num_images_per_description", "5", "--generation_batch_size", "1"]
    assert main([*quick(trained, tmp_path / "whole"), *flags]) == 0
    for index in (2, 3, 1):
        assert not (tmp_path / "parts" / "contact_sheet.png").exists()
        assert main([*quick(trained, tmp_path / "parts"), *flags, "--shard", f"{index}/3"]) == 0
    assert "3 of 5 images are left to the other shards" in capsys.readouterr().out
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for row in rows(tmp_path / "whole"):
        assert (tmp_path / "parts" / row["file"]).read_bytes() == (tmp_path / "whole" / row["file"]).read_bytes()
    # Another number of shards finds everything made.
    assert main([*quick(trained, tmp_path / "parts"), *flags]) == 0
    assert "5 images, 5 of them made before" in capsys.readouterr().out


def test_a_full_disk_leaves_whole_images_and_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    flags = [*quick(trained, tmp_path), "--test_description", "a man"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        assert main(flags) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.png")) and rows(tmp_path) == [] and not list(tmp_path.glob("*tmp*"))
    assert main(flags) == 0 and len(rows(tmp_path)) == 1


def test_images_that_are_not_finite_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dp_gen import DiversePersonPipeline

    pipeline = DiversePersonPipeline.from_pretrained(trained)
    with torch.no_grad():
        pipeline.model.unet.conv_out.bias.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "broken")
    assert main([*quick(tmp_path / "broken", tmp_path / "out"), "--test_description", "a man"]) == 2
    assert "not finite" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("what", ["reference", "image", "mask absent"])
def test_damaged_files_are_named(
    what: str, trained: Path, folder: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "folder")
    shutil.copytree(pool / "uppercloth", tmp_path / "pool" / "uppercloth")
    names = (folder / "img_ids_train.txt").read_text().split()
    stems = [tmp_path / "folder" / name[:5] / name for name in names]
    damaged = sorted((tmp_path / "pool" / "uppercloth").iterdir()) if what == "reference" else []
    damaged += [stem.with_suffix(".png") for stem in stems] if what == "image" else []
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-40])
    if what == "mask absent":
        damaged = [stems[-1].with_suffix(".npy")]
        damaged[0].unlink()
    flags = ["--edit_folder", str(tmp_path / "folder"), "--reference_pool", str(tmp_path / "pool"), "--limit", "3"]
    assert main([*quick(trained, tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert any(path.name in error for path in damaged) and len(error.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("imgs/*"))


@pytest.mark.parametrize("key, value", [("id", 300), ("bbox", [500, 500, 600, 600])])
def test_segments_that_do_not_fit_their_image_are_named(
    key: str, value: Any, trained: Path, folder: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "folder")
    for path in (tmp_path / "folder").glob("*/*.json"):
        info = json.loads(path.read_text(encoding="utf-8"))
        kept = [
            segment if segment["label"] == "uppercloth" else {**segment, key: value} for segment in info["segments"]
        ]
        path.write_text(json.dumps({**info, "segments": kept}), encoding="utf-8")
    flags = ["--edit_folder", str(tmp_path / "folder"), "--reference_pool", str(pool), "--edit_labels", "uppercloth"]
    assert main([*quick(trained, tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert f"'{key}'" in error and "0000000" in error and len(error.strip().splitlines()) == 1


def test_a_segment_that_its_mask_does_not_show_is_no_edit(
    trained: Path, folder: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result would be the original image, listed with the reference's phrase."""
    shutil.copytree(folder, tmp_path / "folder")
    for path in (tmp_path / "folder").glob("*/*.json"):
        info = json.loads(path.read_text(encoding="utf-8"))
        moved = [{**segment, "id": 9} for segment in info["segments"]]
        path.write_text(json.dumps({**info, "segments": moved}), encoding="utf-8")
    flags = ["--edit_folder", str(tmp_path / "folder"), "--reference_pool", str(pool), "--edit_labels", "uppercloth"]
    assert main([*quick(trained, tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert "shows nothing" in error and len(error.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("imgs/*"))


def test_other_flags_do_not_mix(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*quick(trained, tmp_path / "out"), "--test_description", "a man"]
    assert main(flags) == 0
    assert main([*flags, "--guidance_scale", "7"]) == 2
    assert "--guidance_scale" in capsys.readouterr().err
    for changed in ("--resolution", "--mixed_precision", "--load_model"):  # the weights and the size of the images too
        value = {"--resolution": "64", "--mixed_precision": "bf16", "--load_model": str(trained)}[changed]
        assert main([*flags, changed, value]) == 2
        assert changed in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "exactly one"),
        (["--test_description", "a man", "--edit_folder", "x"], "exactly one"),
        (["--test_description", "a man", "--finetuned_model_path", "nowhere"], "nowhere"),
        (["--test_description", "a man", "--guidance_scale", "1"], "--guidance_scale"),
        (["--test_description", "a man<|image|>"], "numbers must be equal"),
        (["--test_description", "a" + "<|image|> b" * 4], "numbers must be equal"),
        (["--test_description", "a man<|image|>", "--test_reference_attribute_folder", "nowhere"], "nowhere"),
        (["--test_description", "a man", "--height", "70"], "--height"),
        (["--test_description", "a man", "--strength", "1.5"], "--strength"),
        (["--edit_folder", "."], "--reference_pool"),
        (["--edit_folder", ".", "--reference_pool", "nowhere"], "nowhere"),
        (["--descriptions", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--test_description", "a man", "--device", "tpu"], "--device"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], said: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quick(trained, tmp_path / "out"), "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_two_tokens_behind_one_word_are_explained(
    trained: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"description": "a man<|image|><|image|>", "references": ["hair/gold_hair.png"] * 2}
    (pool / "two.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert main([*quick(trained, tmp_path / "out"), "--descriptions", str(pool / "two.jsonl")]) == 2
    assert "after its own word" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_pool_with_a_list(pool: Path, tmp_path: Path) -> None:
    listed = {"file": "x.png", "label": "bag", "phrase": " a brown bag "}
    (tmp_path / "x.png").write_bytes((pool / "hair" / "gold_hair.png").read_bytes())
    (tmp_path / "references.jsonl").write_text(json.dumps(listed), encoding="utf-8")
    (reference,) = read_pool(str(tmp_path))["bag"]
    assert reference.phrase == "a brown bag" and reference.file == tmp_path / "x.png"
    assert {label: [one.phrase for one in found] for label, found in read_pool(str(pool)).items()} == {
        "bottomcloth": ["green skirt"],
        "hair": ["gold hair"],
        "uppercloth": ["red coat", "white shirt"],
    }


def test_rewriting_moves_the_ends() -> None:
    caption = "A black coat over blue jeans, and long hair."
    segments = [
        {"label": label, "start": caption.index(phrase), "end": caption.index(phrase) + len(phrase)}
        for label, phrase in (("uppercloth", "A black coat"), ("bottomcloth", "blue jeans"), ("hair", "long hair"))
    ]
    text, moved = rewrite(caption, segments, {"uppercloth": "orange dress", "hair": "gold hair"})
    assert text == "An orange dress over blue jeans, and gold hair."
    assert [text[: segment["end"]].split()[-1] for segment in moved] == ["dress", "jeans", "hair"]
    text, _ = rewrite(caption, segments, {"bottomcloth": "white skirt"})
    assert text == "A black coat over a white skirt, and long hair."


@pytest.mark.parametrize("size", [(96, 48), (97, 41), (64, 64), (50, 90), (300, 100)])
def test_the_square_goes_back_to_its_place(size: tuple[int, int]) -> None:
    """A smooth picture through the square and back is the picture, where the square shows it."""
    height, width = size
    ramp = torch.stack(
        [
            torch.linspace(0, 255, height)[:, None].expand(height, width),
            torch.linspace(0, 255, width)[None].expand(height, width),
            torch.full((height, width), 128.0),
        ]
    ).to(torch.uint8)
    squared, _ = to_square(ramp, torch.zeros(height, width, dtype=torch.uint8), 64)
    place = Square(height, width, 64)
    back, seen = place.back((squared + 1) / 2) * 255, place.visible()[0].bool()
    assert seen.float().mean() > (0.9 if height >= width else 0.5)
    inner = seen.clone()
    inner[:6], inner[-6:], inner[:, :6], inner[:, -6:] = False, False, False, False  # edges are repeated
    assert (back - ramp)[:, inner].abs().max() < 10 and (back - ramp)[:, inner].abs().mean() < 2


def test_pasting_leaves_the_rest_to_the_bit() -> None:
    original = torch.randint(0, 256, (3, 96, 48), dtype=torch.uint8)
    region = torch.zeros(64, 64)
    region[20:44, 22:42] = 1
    pasted = paste(original, torch.full((3, 64, 64), 0.5), feather(region, 0.02), Square(96, 48, 64))
    changed = (pasted != original).any(0)
    assert changed[40:56, 18:30].all() and not changed[:20].any() and not changed[80:].any()
    assert (pasted[:, 40:56, 18:30].float() - 127.5).abs().max() <= 1


def test_regions_grow_and_cover_their_latents() -> None:
    region = torch.zeros(64, 64)
    region[30, 31] = 1
    assert dilate(region, 0.04).sum() == 49 and dilate(region, 0.0).sum() == 1
    latent = at_latent_size(region)
    assert latent.shape == (1, 8, 8) and latent.sum() == 1 and latent[0, 3, 3] == 1
    soft = feather(dilate(region, 0.1), 0.02)
    assert soft.max() <= 1 and soft.min() >= 0 and soft[30, 31] > 0.99


class _Noiseless(torch.nn.Module):
    """Predicts the noise that leads to a given clean image: the loop must then arrive at it."""

    def __init__(self, clean: torch.Tensor, scheduler: Any) -> None:
        super().__init__()
        self.clean, self.scheduler, self.seen = clean, scheduler, []

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> Any:
        from types import SimpleNamespace

        self.seen.append((int(timestep), condition[len(condition) // 2 :].mean().item()))
        signal = self.scheduler.alphas_cumprod[int(timestep)]
        clean = torch.cat([self.clean, self.clean])
        return SimpleNamespace(sample=(latents - signal.sqrt() * clean) / (1 - signal).sqrt())


@pytest.fixture
def scheduler() -> Any:
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )


def conditions(batch: int) -> list[torch.Tensor]:
    return [torch.full((batch, 5, 8), value) for value in (3.0, 2.0, 1.0)]


@pytest.mark.parametrize("start, plain_calls", [(-1, 0), (0, 1), (2, 3), (99, 7)])
def test_references_enter_after_the_given_call(scheduler: Any, start: int, plain_calls: int) -> None:
    from types import SimpleNamespace

    clean = torch.randn(2, 4, 8, 8)
    unet = _Noiseless(clean, scheduler)
    found = denoise(SimpleNamespace(unet=unet), scheduler, torch.randn(2, 4, 8, 8), *conditions(2), 6, 4.0, start)
    assert [condition for _, condition in unet.seen] == [2.0] * plain_calls + [3.0] * (7 - plain_calls)
    assert (found - clean).abs().max() < 0.3


@pytest.mark.parametrize("strength, calls", [(1.0, 11), (0.8, 9), (0.3, 4), (0.1, 1), (0.01, 1)])
def test_edits_make_the_last_steps_and_keep_the_outside(scheduler: Any, strength: float, calls: int) -> None:
    from types import SimpleNamespace

    original, other = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    region = torch.zeros(2, 1, 8, 8)
    region[:, :, 2:6, 2:6] = 1
    unet = _Noiseless(other, scheduler)
    noise = torch.randn(2, 4, 8, 8)
    found = edit(SimpleNamespace(unet=unet), scheduler, original, region, noise, *conditions(2), 10, 4.0, 0, strength)
    assert len(unet.seen) == calls
    outside = (region == 0).expand_as(found)
    assert torch.equal(found[outside], original[outside])
    if strength >= 0.8:
        assert (found - other)[~outside].abs().max() < 0.3


def test_the_last_timesteps_start_up_as_the_whole_loop_does(scheduler: Any) -> None:
    scheduler.set_timesteps(10)
    every = scheduler.timesteps.tolist()
    assert every[1] == every[2] and len(every) == 11
    tail, before = last_timesteps(scheduler, 4)
    assert tail.tolist() == [every[-4], every[-3], every[-3], every[-2], every[-1]] and before == 6
    whole, before = last_timesteps(scheduler, 10)
    assert whole.tolist() == every and before == 0
