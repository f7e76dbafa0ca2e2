"""Every layout of preset tiny: counts, files, readers, and what the annotations promise."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tbps_common.cli import data_main
from tbps_common.datasets import (
    DATASETS,
    ITCPR,
    load_chatpedes,
    load_mals,
    load_processed_eval,
    load_processed_train,
    load_sda,
    load_syncpr,
)
from tbps_world.synth.body import HAIR_PART, LOWER, UPPER
from tbps_world.synth.layouts.base import SeenPictures
from tbps_world.synth.layouts.regions import MALS_SHARDS, SDA_LAYOUT, SDA_SHARDS
from tbps_world.synth.lexicon import words_of
from tbps_world.synth.world import PRESETS, World, draw_picture

Read = Callable[[str], dict[str, str]]
SPLIT_IDS = {"train": 24, "val": 8, "test": 12}


def records(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def images_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.suffix in (".png", ".jpg")}


def all_annotations(tiny: Path) -> list[Path]:
    return [path for path in tiny.rglob("*.json") if path.name != "manifest.json" and "finetune" not in path.parts]


def test_the_preset_has_its_counts(tiny: Path) -> None:
    cuhk, icfg, rstp = (DATASETS[name](str(tiny), verbose=False) for name in ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid"))
    assert len(images_below(tiny / "CUHK-PEDES")) == 176
    assert (len(cuhk.train_annos), len(cuhk.val_annos), len(cuhk.test_annos)) == (96, 32, 48)
    assert len(cuhk.train) == 192
    assert (len(icfg.train), len(icfg.val_annos), len(icfg.test_annos)) == (96, 0, 48)
    assert (len(rstp.train), len(rstp.val_annos), len(rstp.test_annos)) == (240, 40, 60)
    assert {record["id"] for record in cuhk.train_annos} == set(range(1, 25))
    assert {record["id"] for record in icfg.train_annos} == set(range(24))
    assert {record["id"] for record in rstp.train_annos} == set(range(24))
    for dataset in (cuhk, icfg, rstp):
        ids = [dataset.train_id_container, dataset.val_id_container, dataset.test_id_container]
        raw = [
            {record["id"] for record in annos} for annos in (dataset.train_annos, dataset.val_annos, dataset.test_annos)
        ]
        assert len(set.union(*raw)) == sum(map(len, raw)) and [len(part) for part in ids] == [len(part) for part in raw]


def test_every_97th_picture_has_a_third_caption_and_captions_of_a_picture_differ(tiny: Path) -> None:
    for place, record in enumerate(records(tiny / "CUHK-PEDES/reid_raw.json")):
        assert len(record["captions"]) == len(set(record["captions"])) == (3 if place % 97 == 96 else 2)


def test_caption_lengths_by_layout(tiny: Path) -> None:
    for path, count, least, most in (
        ("CUHK-PEDES/reid_raw.json", 2, 12, 45),
        ("ICFG-PEDES/ICFG-PEDES.json", 1, 30, 50),
        ("RSTPReid/data_captions.json", 2, 23, 45),
    ):
        for record in records(tiny / path):
            assert len(record["captions"]) >= count
            for caption in record["captions"]:
                assert least <= len(caption.split()) <= most


def test_images_decode_have_the_declared_size_and_none_is_an_orphan(tiny: Path) -> None:
    itcpr = [record for name in ("query", "gallery") for record in records(tiny / f"ITCPR/{name}.json")]
    syncpr = records(tiny / "SynCPR/SynCPR.json")
    chat = [record for name in ("train", "test") for record in records(tiny / f"ChatPedes/{name}_reid.json")]
    sda = [record for path in (tiny / "data/sda").glob("*.json") for record in records(path)]
    mals = [record for path in (tiny / "MALS/gene_attrs").glob("*.json") for record in records(path)]
    named = {
        "CUHK-PEDES/imgs": [record["file_path"] for record in records(tiny / "CUHK-PEDES/reid_raw.json")],
        "ICFG-PEDES/imgs": [record["file_path"] for record in records(tiny / "ICFG-PEDES/ICFG-PEDES.json")],
        "RSTPReid/imgs": [record["img_path"] for record in records(tiny / "RSTPReid/data_captions.json")],
        "ITCPR": [record["file_path"] for record in itcpr],
        "SynCPR": [record[f"{side}_image_path"] for record in syncpr for side in ("reference", "target")],
        "ChatPedes/imgs": [record["file_path"] for record in chat],
        "images/SDA": [record["image"] for record in sda],
        "MALS": [record["image"] for record in mals],
        "dp": [f"{name[:5]}/{name}.png" for name in (tiny / "dp/img_ids.txt").read_text(encoding="utf-8").split()],
    }
    for folder, names in named.items():
        assert images_below(tiny / folder) == {tiny / folder / name for name in names}
        assert len(names) == len(set(names))
    for path in images_below(tiny):
        with Image.open(path) as image:
            image.load()
            assert (image.mode, image.size) == ("RGB", (48, 96))


def test_every_caption_is_true_readable_and_inside_the_lexicon(
    tiny: Path, tiny_world: World, read_caption: Read
) -> None:
    lexicon = set((tiny / "lexicon.txt").read_text(encoding="utf-8").split())
    checked = 0
    for path, key in (("CUHK-PEDES/reid_raw.json", "id"), ("RSTPReid/data_captions.json", "id")):
        for record in records(tiny / path):
            person = tiny_world.people[record[key] - (path.startswith("CUHK"))]
            name = record["file_path"] if "file_path" in record else record["img_path"]
            view = int(Path(name).stem.split("_")[-1])
            visible = draw_picture(
                tiny_world.picture(tiny_world.people.index(person), view), tiny_world.settings
            ).seen.visible
            both = {"upper_type", "upper_colour", "lower_type", "lower_colour"}
            stated = [read_caption(caption) for caption in record["captions"]]
            for caption, facts in zip(record["captions"], stated):
                checked += 1
                assert set(words_of(caption)) <= lexicon
                assert set(facts) <= visible
                assert facts == {name: getattr(person, name) for name in facts}
            assert any(both <= set(facts) for facts in stated)
    assert checked > 700


def test_every_text_of_every_layout_is_inside_the_lexicon(tiny: Path) -> None:
    lexicon = set((tiny / "lexicon.txt").read_text(encoding="utf-8").split())

    def texts(value: Any, key: str = "") -> list[str]:
        if isinstance(value, dict):
            return [text for name, part in value.items() for text in texts(part, name)]
        if isinstance(value, list):
            return [text for part in value for text in texts(part, key)]
        spoken = (
            "caption",
            "captions",
            "phrases",
            "value",
            "description",
            "edit_caption",
            "reference_caption",
            "target_caption",
            "phrase",
        )
        return [value] if isinstance(value, str) and key in spoken else []

    found = [text for path in all_annotations(tiny) for text in texts(json.loads(path.read_text(encoding="utf-8")))]
    assert len(found) > 3000
    assert {word for text in found for word in words_of(text)} <= lexicon


@pytest.mark.parametrize(
    "name", ["CUHK-PEDES", "ICFG-PEDES", "RSTPReid", "SDA", "SynCPR", "ITCPR", "ChatPedes", "MALS", "finetune"]
)
def test_the_checker_finds_every_layout_usable(tiny: Path, name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = [
        "check",
        "--dataset",
        name,
        "--root_dir",
        str(tiny),
        "--images",
        "exist",
        "--workers",
        "1",
        "--json",
        str(report),
    ]
    assert data_main(arguments) == 0
    assert report.is_file()


def test_conversion_of_the_raw_files_gives_the_generated_finetune_files(tiny: Path, tmp_path: Path) -> None:
    for name in ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid"):
        assert (
            data_main(
                ["convert", "--dataset", name, "--root_dir", str(tiny), "--to", "finetune", "--out", str(tmp_path)]
            )
            == 0
        )
    generated = sorted((tiny / "data/finetune").iterdir())
    assert [path.name for path in generated] == sorted(path.name for path in tmp_path.iterdir())
    for path in generated:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_finetune_files_load_and_show_the_pictures_of_the_raw_folders(tiny: Path) -> None:
    for short, folder in (("cuhk", "CUHK-PEDES/imgs"), ("icfg", "ICFG-PEDES"), ("rstp", "RSTPReid")):
        root = str(tiny / "images" / folder)
        train = load_processed_train(str(tiny / f"data/finetune/{short}_train.json"), root)
        test = load_processed_eval(str(tiny / f"data/finetune/{short}_test.json"), root)
        assert train.n_labels == 24 and len(set(test.g_pids)) == 12 and set(test.q_pids) == set(test.g_pids)
        assert all(Path(path).is_file() for path in (*train.image_paths, *test.image_paths))


def test_sda_boxes_are_inside_the_picture_and_name_what_is_there(
    tiny: Path, tiny_world: World, read_caption: Read
) -> None:
    files = [str(tiny / f"data/sda/sda_{shard}.json") for shard in SDA_SHARDS]
    assert len(files) == 14 and all(Path(file).is_file() for file in files)
    data = load_sda(files, str(tiny / "images/SDA"))
    assert len(data.records) == 96 and data.n_images == 24
    phrases = Counter()
    for record in data.records:
        assert Path(record.image_path).is_file()
        assert len(record.boxes) == len(record.logits) == len(record.phrases)
        for (x, y, w, h), logit in zip(record.boxes, record.logits):
            assert 0 <= x - w / 2 and x + w / 2 <= 1 and 0 <= y - h / 2 and y + h / 2 <= 1
            assert int(w * 48) >= 1 and int(h * 96) >= 1
            assert 0.35 <= logit <= 0.9
        person = tiny_world.people[int(Path(record.image_path).stem.split("_")[0]) // 4]
        for phrase in record.phrases:
            facts = read_caption(phrase)
            assert facts and facts == {name: getattr(person, name) for name in facts}
            phrases.update(list(facts))
    assert phrases["upper_type"] > 60 and phrases["shoes_type"] > 20


def test_some_sda_records_of_a_larger_world_have_no_box() -> None:
    world = World(PRESETS["small"])
    pictures = [placed.picture for placed in SDA_LAYOUT.place(world)]
    one = draw_picture(pictures[0], world.settings).seen
    # Whether a record has boxes does not depend on the picture, so one drawing may stand for all.
    always = frozenset({"gender", "age", "build", "upper_type", "upper_colour", "lower_type", "lower_colour"})
    alike = SeenPictures({picture.key: replace(one, visible=always) for picture in pictures})
    texts = SDA_LAYOUT.annotate(world, alike).values()
    without = [not record["boxes"] for text in texts for record in json.loads(text)]
    assert len(without) == 1600 and 0.015 < np.mean(without) < 0.045


def test_syncpr_pairs_show_the_named_change(tiny: Path, tiny_world: World, read_caption: Read) -> None:
    pairs = load_syncpr(str(tiny / "SynCPR"))
    assert len(pairs) == 48 and set(Counter(pair.cpr_id for pair in pairs).values()) == {2}
    for place, pair in enumerate(pairs):
        assert pair.reference_image_path.endswith(f"test1/sub_img/img_left/{place}-1_left.png")
        assert pair.target_image_path.endswith(f"test1/sub_img/img_right/{place}-1_right.png")
        before, after, edit = (
            read_caption(text or "") for text in (pair.reference_caption, pair.target_caption, pair.edit_caption)
        )
        person = tiny_world.people[pair.cpr_id]
        assert before == {name: getattr(person, name) for name in before}
        assert edit and {name.split("_")[0] for name in edit} <= {"upper", "lower", "shoes", "bag", "headwear"}
        assert all(edit[name] != getattr(person, name) for name in edit if name.endswith("colour"))
        assert after == {name: edit.get(name, getattr(person, name)) for name in after}


def test_itcpr_has_positives_wrong_outfits_and_other_people(tiny: Path) -> None:
    data = ITCPR(str(tiny / "ITCPR"))
    assert data.query["instance_ids"] == list(range(1, 13))
    positives = Counter(data.gallery["instance_ids"])
    assert all(1 <= positives[instance] <= 3 for instance in data.query["instance_ids"])
    distractors = [pid for pid, iid in zip(data.gallery["person_ids"], data.gallery["instance_ids"]) if iid == -1]
    queried = set(data.query["person_ids"])
    assert sum(pid in queried for pid in distractors) == 6
    assert sum(pid not in queried for pid in distractors) == 16
    assert {Path(path).relative_to(tiny / "ITCPR").parts[0] for path in data.query["img_paths"]} == {
        "Celeb-reID",
        "PRCC",
        "LAST",
    }
    for record in records(tiny / "ITCPR/query.json"):
        name = record["file_path"].split("/")
        if name[0] == "Celeb-reID":
            assert name[1] == f"{int(name[2].split('_')[0]):03d}"
        elif name[0] == "LAST":
            assert re.fullmatch(r"\d{6}", name[1])


def test_chatpedes_has_dialogues_in_both_forms(tiny: Path) -> None:
    files = [str(tiny / f"ChatPedes/{split}_reid.json") for split in ("train", "test")]
    raw = [record for file in files for record in records(Path(file))]
    several = [isinstance(record["chats"][0][0], list) for record in raw]
    assert len(raw) == 144 and 0.1 < np.mean(several) < 0.3
    loaded = load_chatpedes(files, str(tiny / "ChatPedes/imgs"))
    assert len(loaded) == len(raw) + sum(several)
    assert all(len(record.turns) == 5 for record in loaded)
    assert len({record.label for record in loaded}) == 36
    cuhk = {path.name: path.read_bytes() for path in images_below(tiny / "CUHK-PEDES")}
    assert all(cuhk[path.name] == path.read_bytes() for path in images_below(tiny / "ChatPedes"))


def test_mals_has_all_91_shards_and_labels_agree_with_the_person(tiny: Path, tiny_world: World) -> None:
    files = [tiny / f"MALS/gene_attrs/g_{name}_attrs.json" for name in MALS_SHARDS]
    assert len(files) == 91 and files[0].name == "g_4x_attrs.json" and all(path.is_file() for path in files)
    assert records(files[0])
    loaded = load_mals([str(path) for path in files], str(tiny / "MALS"))
    assert len(loaded) == 96 and len({record.label for record in loaded}) == 24
    for path in files:
        for record in records(path):
            assert isinstance(record["image_id"], str)
            assert len(record["label"]) == 27 and set(record["label"]) <= {-1, 0, 1}
            person = tiny_world.people[int(record["image_id"].split("_")[-1])]
            assert record["label"][0] == (person.gender == "woman")
            assert record["label"][13] == (person.upper_colour == "black")


def test_dp_samples_have_masks_boxes_and_phrase_ends(tiny: Path, tiny_world: World, read_caption: Read) -> None:
    ids = {
        name: (tiny / f"dp/img_ids{name}.txt").read_text(encoding="utf-8").split() for name in ("", "_train", "_test")
    }
    assert ids[""] == ids["_train"] + ids["_test"] and len(ids["_train"]) == 192 and len(ids["_test"]) == 96
    labels = Counter()
    for name in ids[""]:
        assert re.fullmatch(r"\d{9}", name)
        folder = tiny / "dp" / name[:5]
        sample = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        mask = np.load(folder / f"{name}.npy", allow_pickle=False)
        assert mask.dtype == np.uint8 and mask.shape == (96, 48) == (sample["height"], sample["width"])
        assert set(np.unique(mask)) <= {0, 1, 2, 3}
        for segment in sample["segments"]:
            labels[segment["label"]] += 1
            assert (segment["id"], segment["label"]) in ((1, "hair"), (2, "uppercloth"), (3, "bottomcloth"))
            rows, columns = np.nonzero(mask == segment["id"])
            assert segment["bbox"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert sample["description"][segment["start"] : segment["end"]] == segment["phrase"]
            group = {1: "hair_length", 2: "upper_type", 3: "lower_type"}[segment["id"]]
            assert group in read_caption(segment["phrase"])
    assert labels["uppercloth"] == 288 and labels["hair"] > 60 and labels["bottomcloth"] > 250
    picture = draw_picture(tiny_world.picture(0, 0), tiny_world.settings)
    mask = np.load(tiny / "dp/00000/000000000.npy", allow_pickle=False)
    for value, part in ((1, HAIR_PART), (2, UPPER), (3, LOWER)):
        assert ((mask == value) == (picture.parts == part)).all()
    with Image.open(tiny / "dp/00000/000000000.png") as image:
        assert (np.asarray(image) == picture.picture).all()
