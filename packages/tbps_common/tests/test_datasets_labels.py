"""Processed files, SDA, SynCPR, ITCPR, ChatPedes and MALS: labels, order, paths, and the counts that go with them."""

import dataclasses
import gc
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbps_common.datasets import (
    ITCPR,
    DatasetError,
    load_chatpedes,
    load_mals,
    load_processed_eval,
    load_processed_train,
    load_sda,
    load_syncpr,
)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def turns(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"from": "gpt", "value": f"{text}?"}, {"from": "user", "value": text}] for text in texts]


def test_processed_training_labels_follow_first_appearance_over_all_files(tmp_path: Path) -> None:
    def pair(name: str, identity: int | str) -> dict:
        return {"image": name, "caption": f"caption of {name}", "image_id": identity}

    first = write(tmp_path / "a.json", [pair("1.png", 70), pair("2.png", "x"), pair("3.png", 70)])
    second = write(tmp_path / "b.json", [pair("4.png", 5), pair("5.png", "70"), pair("6.png", "x")])
    data = load_processed_train([first, second], tmp_path / "images")
    assert data.labels == [0, 1, 0, 2, 3, 1]  # 70 and "70" are different ids: compared as stored
    assert data.n_labels == 4
    assert data.image_paths == [f"{tmp_path}/images/{i}.png" for i in range(1, 7)]
    assert data.captions == [f"caption of {i}.png" for i in range(1, 7)]
    assert load_processed_train(str(first), tmp_path).labels == [0, 1, 0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.n_labels = 3  # type: ignore[misc]


def test_processed_training_files_of_several_data_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Equal ids of two files are one person, with a warning, unless a file says that its people are its own."""

    def pair(name: str, identity: int) -> dict:
        return {"image": name, "caption": "a man", "image_id": identity}

    first = write(tmp_path / "a.json", [pair("1.png", 7), pair("2.png", 8)])
    second = write(tmp_path / "b.json", [pair("1.png", 8), pair("3.png", 9), pair("4.png", 8)])
    with caplog.at_level("WARNING"):
        assert load_processed_train([first, second], tmp_path).labels == [0, 1, 1, 2, 1]
    (line,) = caplog.messages
    assert line.startswith(f"1 image_id(s) of {second} stand in {first} too") and "own_ids: True" in line
    caplog.clear()
    marked = {"file": str(second), "image_root": str(tmp_path / "other"), "own_ids": True}
    with caplog.at_level("WARNING"):
        data = load_processed_train([first, marked, marked], tmp_path)
    assert data.labels == [0, 1, 2, 3, 2, 4, 5, 4] and data.n_labels == 6
    assert data.image_paths[1:3] == [f"{tmp_path}/2.png", f"{tmp_path}/other/1.png"]
    assert not caplog.messages


def test_processed_evaluation_is_flat_and_raw(tmp_path: Path) -> None:
    records = [
        {"image": "a.png", "caption": ["one", "two"], "image_id": 11004},
        {"image": "b.png", "caption": [], "image_id": "7"},
        {"image": "a.png", "caption": ["three"], "image_id": 11004},
    ]
    data = load_processed_eval(write(tmp_path / "test.json", records), tmp_path)
    assert data.image_paths == [f"{tmp_path}/a.png", f"{tmp_path}/b.png", f"{tmp_path}/a.png"]
    assert (data.captions, data.g_pids, data.q_pids) == (["one", "two", "three"], [11004, 7, 11004], [11004] * 3)


def test_training_and_evaluation_files_taken_for_each_other_are_named(tmp_path: Path) -> None:
    train = write(tmp_path / "train.json", [{"image": "a.png", "caption": "text", "image_id": 1}])
    test = write(tmp_path / "test.json", [{"image": "a.png", "caption": ["text"], "image_id": 1}])
    with pytest.raises(DatasetError, match=r"test.json: record 0 .* as evaluation files do"):
        load_processed_train([train, test], tmp_path)
    with pytest.raises(DatasetError, match=r"train.json: record 0 .* as training files do"):
        load_processed_eval(train, tmp_path)


sda_records = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.sampled_from(["a man", "a shirt", "shoes", "A man", ""]), max_size=4)),
    max_size=10,
)


@settings(max_examples=50, deadline=None)
@given(shards=st.lists(sda_records, min_size=1, max_size=3))
def test_sda_labels_equal_a_naive_count(shards: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sda")
    files = []
    for number, shard in enumerate(shards):
        records = [
            {
                "image": f"c_{number}/{i}.jpg",
                "boxes": [[0.5, 0.5, 0.25, 1]] * len(phrases),
                "logits": [0.5] * len(phrases),
                "phrases": phrases,
                "caption": "a man",
                "image_id": identity,
            }
            for i, (identity, phrases) in enumerate(shard)
        ]
        files.append(write(folder / f"sda_{number}.json", records))
    data = load_sda(files, folder)

    everything = [record for shard in shards for record in shard]
    identities = list(dict.fromkeys(identity for identity, _ in everything))
    phrases = list(dict.fromkeys(phrase for _, record in everything for phrase in record))
    assert (data.n_images, data.n_labels) == (len(identities), len(identities) + len(phrases))
    for record, (identity, texts) in zip(data.records, everything, strict=True):
        assert record.image_label == identities.index(identity)
        assert record.phrases == texts
        assert record.phrase_labels == [len(identities) + phrases.index(text) for text in texts]
        assert record.boxes == [[0.5, 0.5, 0.25, 1]] * len(texts)
        assert record.logits == [0.5] * len(texts)


def test_sda_lists_of_unequal_length_say_how_long_they_are(tmp_path: Path) -> None:
    record = {"image": "a.jpg", "boxes": [], "logits": [0.5], "phrases": [], "caption": "a", "image_id": 0}
    with pytest.raises(DatasetError, match="0 boxes, 1 logits, 0 phrases"):
        load_sda(write(tmp_path / "sda.json", [record]), tmp_path)


def test_syncpr_paths_and_optional_captions(tmp_path: Path) -> None:
    full = {
        "reference_caption": "before",
        "target_caption": "after",
        "reference_image_path": "test1/l.png",
        "target_image_path": "test1/r.png",
        "edit_caption": "Wearing a skirt.",
        "cpr_id": 9,
    }
    bare = {key: value for key, value in full.items() if not key.endswith("e_caption") and key != "target_caption"}
    write(tmp_path / "SynCPR.json", [full, bare | {"edit_caption": "x", "cpr_id": "12"}])
    first, second = load_syncpr(tmp_path)
    assert (first.reference_image_path, first.target_image_path) == (
        f"{tmp_path}/test1/l.png",
        f"{tmp_path}/test1/r.png",
    )
    assert (first.edit_caption, first.cpr_id) == ("Wearing a skirt.", 9)
    assert (first.reference_caption, first.target_caption) == ("before", "after")
    assert (second.reference_caption, second.target_caption, second.cpr_id) == (None, None, 12)
    other = write(tmp_path / "elsewhere" / "list.json", [full])
    assert load_syncpr(tmp_path, other) == load_syncpr(tmp_path, "elsewhere/list.json") == [first]


@pytest.mark.parametrize("nested", [False, True])
def test_itcpr_lists_containers_and_both_layouts(tmp_path: Path, nested: bool, caplog) -> None:
    folder = tmp_path / "datasets" if nested else tmp_path
    query = {"file_path": "PRCC/1.jpg", "datasets": "PRCC", "person_id": 3, "instance_id": "4", "caption": "red coat"}
    gallery = [
        {"file_path": f"LAST/{i}.jpg", "datasets": "LAST", "person_id": i, "instance_id": -1 if i else 4}
        for i in range(3)
    ]
    write(folder / "query.json", [query, query])
    write(folder / "gallery.json", gallery)
    caplog.set_level(logging.INFO, "tbps_common.datasets")
    data = ITCPR(tmp_path)
    assert data.query == {
        "person_ids": [3, 3],
        "img_paths": [f"{folder}/PRCC/1.jpg"] * 2,
        "instance_ids": [4, 4],
        "captions": ["red coat", "red coat"],
    }
    assert data.gallery == {
        "person_ids": [0, 1, 2],
        "img_paths": [f"{folder}/LAST/{i}.jpg" for i in range(3)],
        "instance_ids": [4, -1, -1],
    }
    assert (data.query_pid_container, data.query_iid_container) == ({3}, {4})
    assert (data.gallery_pid_container, data.gallery_iid_container) == ({0, 1, 2}, {4, -1})
    assert "| subset" in caplog.text and "iids" in caplog.text


def test_itcpr_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=rf"ITCPR needs {tmp_path}/query.json \(or the same under {tmp_path}/datasets\)"
    ):
        ITCPR(tmp_path)
    write(tmp_path / "query.json", [])
    with pytest.raises(DatasetError, match=f"ITCPR needs {tmp_path}/gallery.json"):
        ITCPR(tmp_path)
    (tmp_path / "query.json").rename(write(tmp_path / "datasets" / "query.json", []))
    with pytest.raises(DatasetError, match=f"{tmp_path}/datasets/gallery.json does not exist"):
        ITCPR(tmp_path)


def test_chatpedes_single_and_several_dialogues(tmp_path: Path, caplog) -> None:
    records = [
        {"id": 30, "file_path": "0.png", "chats": turns("a", "b", "c")},
        {"id": 99, "file_path": "1.png", "chats": []},
        {"id": "s", "file_path": "2.png", "chats": [turns("d"), turns("e", "f")]},
        {"id": 98, "file_path": "3.png", "chats": [[]]},
        {"id": 30, "file_path": "4.png", "chats": [turns("g")]},
    ]
    more = [
        {"id": 7, "file_path": "5.png", "chats": [[], turns("h")]},
        {"id": "s", "file_path": "6.png", "chats": turns("i")},
    ]
    files = [write(tmp_path / "train.json", records), write(tmp_path / "more.json", more)]
    loaded = load_chatpedes(files, tmp_path)
    assert [(Path(chat.image_path).name, chat.label) for chat in loaded] == [
        ("0.png", 0),
        ("2.png", 1),
        ("2.png", 1),
        ("4.png", 0),
        ("5.png", 2),
        ("6.png", 1),
    ]
    assert [chat.turns for chat in loaded[:3]] == [turns("a", "b", "c"), turns("d"), turns("e", "f")]
    warnings = [entry.getMessage() for entry in caplog.records]
    assert warnings == ["ChatPedes: 2 records without a dialogue are left out"]


@pytest.mark.parametrize(("limit", "kept"), [(0, 3), (-1, 3), (1, 1), (2, 2), (9, 3)])
def test_chatpedes_turn_limit(tmp_path: Path, limit: int, kept: int) -> None:
    file = write(tmp_path / "a.json", [{"id": 1, "file_path": "a.png", "chats": turns("a", "b", "c")}])
    (chat,) = load_chatpedes(file, tmp_path, turn_limit=limit)
    assert chat.turns == turns("a", "b", "c")[:kept]


def test_mals_labels_over_shards(tmp_path: Path) -> None:
    def pair(name: str, identity: int | str, **rest: Any) -> dict:
        return {"image": name, "caption": f"caption {name}", "image_id": identity} | rest

    shards = [
        write(tmp_path / "0.json", [pair("gene_crop/a.jpg", "c_0", label=[1, 0, -1]), pair("gene_crop/b.jpg", "c_1")]),
        write(tmp_path / "1.json", []),
        write(tmp_path / "2.json", [pair("gene_crop/c.jpg", "c_1", label="unused"), pair("gene_crop/d.jpg", 0)]),
    ]
    records = load_mals(shards, tmp_path)
    assert [record.label for record in records] == [0, 1, 1, 2]
    assert [record.image_path for record in records] == [f"{tmp_path}/gene_crop/{name}.jpg" for name in "abcd"]
    assert records[0].caption == "caption gene_crop/a.jpg"


def test_an_image_root_with_or_without_a_slash_is_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [{"image": "x/1.png", "caption": "a", "image_id": 0}])
    assert load_mals(file, "data")[0].image_path == load_mals(file, "data/")[0].image_path == "data/x/1.png"
    assert load_mals(file, "")[0].image_path == "x/1.png"


def test_empty_captions_are_counted_per_file(tmp_path: Path, caplog) -> None:
    pairs = [{"image": "a.png", "caption": caption, "image_id": 0} for caption in ("", "text", "  ")]
    files = [write(tmp_path / "a.json", pairs), write(tmp_path / "b.json", pairs[1:2])]
    load_processed_train(files, tmp_path)
    load_mals(files, tmp_path)
    assert [entry.getMessage() for entry in caplog.records] == [f"{files[0]}: 2 empty captions"] * 2


def test_garbage_collection_is_paused_only_while_reading(tmp_path: Path) -> None:
    assert gc.isenabled()
    load_mals(write(tmp_path / "a.json", []), tmp_path)
    assert gc.isenabled()
    with pytest.raises(DatasetError):
        load_mals(tmp_path / "absent.json", tmp_path)
    assert gc.isenabled()


def test_reading_is_fast_enough_for_a_million_records(tmp_path: Path) -> None:
    """1.5 million records are to load within 60 s: 20,000 of them within 0.8 s of processor time, with room for noise."""
    pairs = [
        {"image": f"gene_crop/{i}.jpg", "caption": "word " * 40, "image_id": f"c_{i}", "label": [1] * 27}
        for i in range(20_000)
    ]
    file = write(tmp_path / "a.json", pairs)
    start = time.process_time()
    assert len(load_mals(file, tmp_path)) == 20_000
    assert time.process_time() - start < 0.8 * 3
