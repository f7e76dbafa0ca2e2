"""segment.py: masks, phrases and folders, against the synthetic world's own and with tiny random models."""

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
from PIL import Image, ImageColor

from dp_gen.segment import main
from dp_gen.segmentation.masks import components, large_components, tight_box, type_mask
from dp_gen.segmentation.phrases import find_phrases, load_lexicon
from tbps_world.cli import synth_main

PACKAGE = Path(__file__).resolve().parents[1]
TYPES = ("hair", "uppercloth", "bottomcloth")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic world as CUHK-PEDES, and as the training folder that its renderer knows."""
    root = tmp_path_factory.mktemp("world")
    assert synth_main(["--out", str(root), "--preset", "tiny", "--ids", "8", "--layouts", "cuhk,dp"]) == 0
    return root


@pytest.fixture(scope="module")
def truth(world: Path) -> dict[str, dict[str, Any]]:
    """The renderer's samples by id."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (world / "dp").glob("*/*.json")}


@pytest.fixture(scope="module")
def masks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The renderer's masks under the names of the CUHK-PEDES images: half as PNG, half as arrays."""
    folder = tmp_path_factory.mktemp("masks")
    number = 0
    for record in json.loads((world / "CUHK-PEDES" / "reid_raw.json").read_text(encoding="utf-8")):
        if record["split"] == "val":
            continue
        name = f"{number:09d}"
        mask = np.load(world / "dp" / name[:5] / f"{name}.npy")
        target = (folder / record["file_path"]).with_suffix(".png" if number % 2 else ".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(target) if number % 2 else np.save(target, mask)
        number += len(record["captions"])
    return folder


@pytest.fixture
def flags(world: Path, tmp_path: Path) -> list[str]:
    return [
        *("--annotations", str(world / "CUHK-PEDES" / "reid_raw.json")),
        *("--image_root", str(world / "CUHK-PEDES" / "imgs")),
        *("--output_dir", str(tmp_path / "folder"), "--device", "cpu"),
    ]


@pytest.fixture
def mask_flags(flags: list[str], masks: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "classes.json").write_text(json.dumps({t: [n] for n, t in enumerate(TYPES, 1)}), encoding="utf-8")
    return [*flags, "--backend", "none", "--mask_dir", str(masks), "--class_map", str(tmp_path / "classes.json")]


def test_the_synthetic_world_comes_out_as_its_renderer_knows_it(
    world: Path, truth: dict[str, dict[str, Any]], mask_flags: list[str], tmp_path: Path
) -> None:
    assert main([*mask_flags, "--keep_empty"]) == 0
    folder = tmp_path / "folder"
    for name in ("img_ids.txt", "img_ids_train.txt", "img_ids_test.txt"):
        assert (folder / name).read_text() == (world / "dp" / name).read_text()
    ends = same = 0
    for name, expected in truth.items():
        stem = folder / name[:5] / name
        found = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        own, drawn = np.load(stem.with_suffix(".npy")), np.load((world / "dp" / name[:5] / name).with_suffix(".npy"))
        assert own.dtype == np.uint8 and own.shape == drawn.shape
        assert (own != drawn).mean() < 0.01  # only specks are dropped
        assert found["description"] == expected["description"] and found["width"] == expected["width"]
        by_label = {segment["label"]: segment for segment in found["segments"]}
        for segment in expected["segments"]:
            if segment["label"] not in by_label:
                assert (drawn == segment["id"]).mean() < 0.02  # nothing but specks
                continue
            ends += 1
            same += by_label[segment["label"]]["end"] == segment["end"]
            assert by_label[segment["label"]]["id"] == segment["id"]
        (image,) = [path for path in stem.parent.glob(f"{name}.*") if path.suffix in (".jpg", ".png")]
        assert image.read_bytes() == (world / "dp" / name[:5] / image.name).read_bytes()
    assert ends > 50 and same == ends


def test_the_folder_can_be_trained_on(mask_flags: list[str], tmp_path: Path) -> None:
    from dp_gen import check_dataset

    assert main(mask_flags) == 0
    report = check_dataset(tmp_path / "folder", "all")
    assert not report.problems and report.samples > 20 and set(report.labels) == set(TYPES)
    meta = [json.loads(line) for line in (tmp_path / "folder" / "meta.jsonl").read_text().splitlines()]
    assert meta[0] == {
        **{"id": "000000000", "split": meta[0]["split"], "caption_index": 0, "segments": meta[0]["segments"]},
        **{"file_path": meta[0]["file_path"], "person": meta[0]["person"]},
    }
    counted = json.loads((tmp_path / "folder" / "segments_report.json").read_text())
    assert counted["segments"] == dict(report.labels) and counted["captions"] == len(meta)
    with Image.open(tmp_path / "folder" / "segments.png") as picture:
        found = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {
        ImageColor.getrgb(name) for name in ("crimson", "royalblue", "seagreen")
    } <= found  # boxes of the three types


def test_phrases_agree_with_the_synthetic_captions(truth: dict[str, dict[str, Any]]) -> None:
    lexicon = load_lexicon()
    wrong = []
    for sample in truth.values():
        found = find_phrases(sample["description"], lexicon)
        for segment in sample["segments"]:
            start, end = found.get(segment["label"], (-1, -1))
            if end != segment["end"] or sample["description"][start:end] != segment["phrase"]:
                wrong.append((sample["description"], segment["phrase"], sample["description"][start:end]))
    assert not wrong, wrong[:5]


@pytest.mark.parametrize(
    "caption, expected",
    [
        (
            "A woman with long black hair is wearing a black shirt and a red skirt.",
            {"hair": "long black hair", "uppercloth": "a black shirt", "bottomcloth": "a red skirt"},
        ),
        (
            "The man has short hair. He wears a black and white striped t-shirt, and a pair of blue jeans.",
            {
                "hair": "short hair",
                "uppercloth": "a black and white striped t-shirt",
                "bottomcloth": "a pair of blue jeans",
            },
        ),
        (
            "A man in a gray suit jacket and suit pants",
            {"uppercloth": "a gray suit jacket", "bottomcloth": "suit pants"},
        ),
        ("a blue dress shirt over khaki shorts", {"uppercloth": "a blue dress shirt", "bottomcloth": "khaki shorts"}),
        ("a bag on top of a cart", {"bag": "a bag"}),
        ("Jeans, sneakers and a ponytail.", {"bottomcloth": "Jeans", "shoes": "sneakers", "hair": "a ponytail"}),
        ("her hair is in a bun; a white tank top", {"hair": "her hair", "uppercloth": "a white tank top"}),
        ("", {}),
        ("白い服の女性 👕 naïve", {}),
    ],
)
def test_phrases_of_real_captions(caption: str, expected: dict[str, str]) -> None:
    found = find_phrases(caption, load_lexicon())
    assert {label: caption[start:end] for label, (start, end) in found.items()} == expected


def test_a_lexicon_adds_words_and_types(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text('{"hair": ["afro puff"], "umbrella": ["Umbrella"]}', encoding="utf-8")
    caption = "a big afro puff under a red umbrella, in jeans"
    found = find_phrases(caption, load_lexicon(str(tmp_path / "more.json")))
    assert {label: caption[slice(*span)] for label, span in found.items()} == {
        "hair": "a big afro puff",
        "umbrella": "a red umbrella",
        "bottomcloth": "jeans",
    }


def test_components_agree_with_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    generator = np.random.default_rng(0)
    for density in (0.1, 0.3, 0.45, 0.6, 0.9):
        region = generator.random((41, 37)) < density
        own, (other, count) = components(region), ndimage.label(region, structure=np.ones((3, 3)))
        pairs = np.unique(np.stack([own.ravel(), other.ravel()]), axis=1)
        assert pairs.shape[1] == count + 1 == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
        sizes = np.bincount(other.ravel())
        keep = sizes >= 0.005 * region.size
        keep[0] = False
        assert np.array_equal(large_components(region, 0.005), keep[other])


def test_masks_take_the_first_of_overlapping_types_and_drop_specks() -> None:
    first, second = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    first[2:8, 3:9], second[6:15, 3:9] = True, True
    second[19, 19] = True
    mask = type_mask({"b": second, "a": first}, ("a", "b"), (20, 20))
    assert (mask == 1).sum() == 36 and (mask == 2).sum() == 42 and mask[19, 19] == 0
    assert tight_box(mask == 2) == [3, 8, 9, 15] and tight_box(mask == 3) is None
    assert not type_mask({}, ("a",), (4, 5)).any()


@pytest.fixture(scope="module")
def parser_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SegFormer of the smallest size, with ATR's number of classes."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    folder = tmp_path_factory.mktemp("parser")
    SegformerForSemanticSegmentation(SegformerConfig(num_labels=18, **sizes)).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def sam_model(folder: Path, kind: str) -> Path:
    """A random SAM or SAM-HQ of the smallest size."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    name = {"sam": "Sam", "sam_hq": "SamHQ"}[kind]
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {
        "image_size": 64,
        "patch_size": 16,
        "num_pos_feats": 4,
        "mlp_dim": 16,
        "global_attn_indexes": [0, 1],
        "window_size": 2,
    }
    prompt = {"hidden_size": 8, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    decoder |= {"iou_head_hidden_dim": 8, "iou_head_depth": 2}
    if kind == "sam_hq":
        decoder["vit_dim"] = 16
    config = getattr(t, f"{name}Config")(
        vision_config=getattr(t, f"{name}VisionConfig")(**vision).to_dict(),
        prompt_encoder_config=getattr(t, f"{name}PromptEncoderConfig")(**prompt).to_dict(),
        mask_decoder_config=getattr(t, f"{name}MaskDecoderConfig")(**decoder).to_dict(),
    )
    getattr(t, f"{name}Model")(config).save_pretrained(folder)
    processor = t.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    getattr(t, f"{name}Processor")(processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for the first four images of the world."""
    records = json.loads((world / "CUHK-PEDES" / "reid_raw.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("few") / "few.json"
    path.write_text(json.dumps(records[:4]), encoding="utf-8")
    return ["--annotations", str(path), "--image_root", str(world / "CUHK-PEDES" / "imgs"), "--device", "cpu"]


def test_a_parser_and_sam_of_transformers_run(few: list[str], parser_model: Path, tmp_path: Path) -> None:
    parsed = [
        "--parsing_model",
        str(parser_model),
        "--batch_size",
        "3",
        "--splits",
        "train",
        "val",
        "test",
        "--keep_empty",
    ]
    assert main([*few, *parsed, "--output_dir", str(tmp_path / "parsing")]) == 0
    masks = {path.name: np.load(path) for path in (tmp_path / "parsing").glob("*/*.npy")}
    assert len(masks) >= 4 and all(set(np.unique(mask)) <= {0, 1, 2, 3} for mask in masks.values())
    for kind in ("sam", "sam_hq"):
        model = sam_model(tmp_path / f"model_{kind}", kind)
        prompted = ["--backend", "sam", "--sam_model", str(model), "--output_dir", str(tmp_path / kind)]
        assert main([*few, *parsed, *prompted]) == 0
        for path in (tmp_path / kind).glob("*/*.npy"):
            assert np.load(path).shape == masks[path.name].shape


def test_specks_of_the_parser_do_not_stretch_the_boxes_for_sam(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dp_gen.segmentation.backends import BoxPrompted
    from dp_gen.segmentation.masks import ATR_CLASSES

    class Parsed:
        class_map = ATR_CLASSES

        def class_pictures(self, images: Any) -> list[np.ndarray]:
            picture = np.zeros((128, 64), np.int64)
            picture[4:24, 20:44] = 2  # hair
            picture[126, 60] = 2  # and one pixel at the feet
            picture[100, 10] = 5  # nothing but a speck
            return [picture]

    segmenter = BoxPrompted(str(sam_model(tmp_path, "sam")), ("hair", "bottomcloth"), Parsed(), {}, "cpu")  # type: ignore[arg-type]
    asked = []
    monkeypatch.setattr(segmenter, "_prompted", lambda image, boxes, person: asked.append(boxes) or {})
    segmenter.regions([Image.new("RGB", (64, 128))], ["a.jpg"])
    assert asked == [{"hair": [20, 4, 44, 24]}]


def test_sam_takes_boxes_from_a_file(few: list[str], world: Path, tmp_path: Path) -> None:
    name = json.loads(Path(few[1]).read_text(encoding="utf-8"))[0]["file_path"]
    (tmp_path / "boxes.json").write_text(json.dumps({name: {"hair": [4, 2, 30, 40]}}), encoding="utf-8")
    model = sam_model(tmp_path / "sam", "sam")
    flags = ["--backend", "sam", "--sam_model", str(model), "--boxes", str(tmp_path / "boxes.json"), "--keep_empty"]
    assert main([*few, *flags, "--splits", "train", "val", "test", "--output_dir", str(tmp_path / "out")]) == 0
    masks = [np.load(path) for path in sorted((tmp_path / "out").glob("*/*.npy"))]
    assert set(np.unique(np.concatenate([mask.ravel() for mask in masks]))) <= {0, 1}
    assert not masks[-1].any()  # no box, no mask


def test_the_parser_finds_what_its_model_predicts(parser_model: Path, world: Path) -> None:
    import torch
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    from dp_gen.segmentation.backends import Parser

    path = next((world / "CUHK-PEDES" / "imgs").rglob("*.png"), None) or next((world / "CUHK-PEDES").rglob("*.jpg"))
    image = Image.open(path).convert("RGB")
    model = SegformerForSemanticSegmentation.from_pretrained(parser_model).eval()
    inputs = SegformerImageProcessor.from_pretrained(parser_model)(images=image, return_tensors="pt")
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(model(**inputs).logits, image.size[::-1], mode="bilinear")
    expected = logits[0].argmax(0).numpy()
    regions = Parser(str(parser_model), TYPES, {"hair": [2], "uppercloth": [4, 7], "bottomcloth": [5, 6]}, "cpu")
    (found,) = regions.regions([image], [path.name])
    for label, classes in (("hair", [2]), ("uppercloth", [4, 7]), ("bottomcloth", [5, 6])):
        assert np.array_equal(found.get(label, np.zeros_like(expected, bool)), np.isin(expected, classes))


def test_a_killed_run_goes_on_and_ends_the_same(mask_flags: list[str], tmp_path: Path) -> None:
    assert main(mask_flags) == 0
    whole = {
        p.relative_to(tmp_path / "folder"): p.read_bytes() for p in (tmp_path / "folder").rglob("*") if p.is_file()
    }
    index = mask_flags.index("--output_dir") + 1
    again = [*mask_flags[:index], str(tmp_path / "again"), *mask_flags[index + 1 :]]
    process = subprocess.Popen(
        [sys.executable, "segment.py", *again, "--batch_size", "1"], cwd=PACKAGE, stdout=subprocess.DEVNULL
    )
    while len(list((tmp_path / "again").glob("*/*.json"))) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "again" / "img_ids.txt").exists()
    assert main(again) == 0
    for path, content in whole.items():
        if path.name not in ("segments_report.json", "segment_settings.json"):
            assert (tmp_path / "again" / path).read_bytes() == content
    assert {p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file()} == set(whole)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_batch_and_the_same_command_goes_on(
    number: int,
    status: int,
    mask_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dp_gen.segmentation.backends import MaskFolder

    find = MaskFolder.regions

    def find_and_signal(self: MaskFolder, images: Any, names: Any) -> Any:
        os.kill(os.getpid(), number)
        return find(self, images, names)

    with monkeypatch.context() as patch:
        patch.setattr(MaskFolder, "regions", find_and_signal)
        assert main([*mask_flags, "--batch_size", "2"]) == status
    assert "to continue from here" in capsys.readouterr().err
    done = len(list((tmp_path / "folder").glob("*/*.json")))
    assert done >= 2 and not (tmp_path / "folder" / "img_ids.txt").exists()
    assert main(mask_flags) == 0
    assert f", {done} of them done before" in capsys.readouterr().out


def test_shards_make_together_what_one_run_makes(
    mask_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(mask_flags) == 0
    parts = [*mask_flags, "--output_dir", str(tmp_path / "parts")]
    for index in (2, 1, 3):
        assert not (tmp_path / "parts" / "img_ids.txt").exists()
        assert main([*parts, "--shard", f"{index}/3"]) == 0
    assert "left to the other shards" in capsys.readouterr().out
    whole = {path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*")}
    assert whole == {path.relative_to(tmp_path / "parts") for path in (tmp_path / "parts").rglob("*")}
    for name in ("img_ids.txt", "meta.jsonl", "segments_report.json"):
        assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_cut_off_image_is_named_and_the_rest_is_kept(
    world: Path, mask_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "CUHK-PEDES" / "imgs", tmp_path / "imgs")
    records = json.loads((world / "CUHK-PEDES" / "reid_raw.json").read_text(encoding="utf-8"))
    last = [record for record in records if record["split"] in ("train", "test")][-1]["file_path"]
    whole = (tmp_path / "imgs" / last).read_bytes()
    flags = [*mask_flags, "--image_root", str(tmp_path / "imgs"), "--batch_size", "1"]
    for content in (whole[:-40], whole[: len(whole) // 2], b""):
        (tmp_path / "imgs" / last).write_bytes(content)
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert last in error and "damaged" in error and len(error.strip().splitlines()) == 1
    (tmp_path / "imgs" / last).write_bytes(whole)
    assert main(flags) == 0
    assert ", 0 of them done before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, said",
    [
        (["--annotations", "nowhere.json"], "nowhere.json does not exist"),
        (["--image_root", "nowhere"], "--image_root"),
        (["--backend", "none"], "--mask_dir"),
        (["--mask_dir", "x"], "--backend none"),
        (["--boxes", "x"], "--backend sam"),
        (["--types", "hair", "hair"], "twice"),
        (["--types", "tail"], "--lexicon"),
        (["--backend", "none", "--mask_dir", "nowhere"], "--mask_dir nowhere"),
        (["--parsing_model", "nowhere/at all"], "--parsing_model"),
        (["--parsing_model", "./nowhere"], "--parsing_model ./nowhere is not a folder"),
        (["--device", "tpu"], "--device"),
        (["--lexicon", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_line(
    change: list[str], said: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, *change]) == 2
    error = capsys.readouterr().err
    assert said in error and len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "folder").exists()


def test_other_flags_do_not_mix_into_a_folder(mask_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(mask_flags) == 0
    assert main([*mask_flags, "--types", "uppercloth", "hair"]) == 2
    assert "--types" in capsys.readouterr().err


def test_an_annotation_file_that_changed_is_noticed(
    mask_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids are places in that file: with a record less, finished samples would belong to other captions."""
    records = json.loads(Path(mask_flags[1]).read_text(encoding="utf-8"))
    own = tmp_path / "own.json"
    own.write_text(json.dumps(records), encoding="utf-8")
    assert main([*mask_flags, "--annotations", str(own)]) == 0
    own.write_text(json.dumps(records[1:]), encoding="utf-8")
    assert main([*mask_flags, "--annotations", str(own)]) == 2
    assert "--annotations (content)" in capsys.readouterr().err


def test_a_mask_of_another_size_is_named(
    flags: list[str], masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(masks, tmp_path / "masks")
    broken = next((tmp_path / "masks").rglob("*.npy"))
    np.save(broken, np.zeros((3, 4), np.uint8))
    assert main([*flags, "--backend", "none", "--mask_dir", str(tmp_path / "masks"), "--types", "hair"]) == 2
    assert broken.name in capsys.readouterr().err
    os.unlink(broken)
    assert main([*flags, "--backend", "none", "--mask_dir", str(tmp_path / "masks"), "--types", "hair"]) == 2
    assert "must hold a mask for every image" in capsys.readouterr().err
