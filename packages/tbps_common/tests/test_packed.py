"""Packed sequences: lists that loader processes share; and the annotation that is read into them, part by part."""

import copy
import json
from collections.abc import Iterator
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import ConcatDataset, DataLoader

from tbps_common.datasets import load_mals, load_sda, load_syncpr
from tbps_common.errors import DatasetError
from tbps_common.packed import PackedNumbers, PackedStrings
from tbps_world.bench.annotation import in_fresh_process, write_mals, write_sda, write_syncpr

STRINGS = ["a", "", "gr\u00fc\u00df", "\u9752\u3044", "a much longer string", ""]


class Spawning:
    """Stands for a process that is being started."""

    DupFd = int

    def duplicate_for_child(self, descriptor: int) -> int:
        return descriptor


@pytest.fixture
def spawning() -> Iterator[None]:
    set_spawning_popen(Spawning())  # type: ignore[arg-type]
    yield
    set_spawning_popen(None)


def test_packed_sequences_are_lists() -> None:
    for values, packed in ((STRINGS, PackedStrings(STRINGS)), ([3, -1, 2**40], PackedNumbers("q", [3, -1, 2**40]))):
        assert packed == values and values == packed and list(packed) == values and packed != values[:-1]
        size = len(values)
        assert [packed[place] for place in range(-size, size)] == values * 2
        assert packed[1:] == values[1:] and packed[::-2] == values[::-2]
        for place in (size, -size - 1):
            with pytest.raises(IndexError):
                packed[place]
    assert len(PackedStrings()) == 0 and PackedStrings() == []
    one_by_one = PackedStrings()
    for string in STRINGS:
        one_by_one.append(string)
    assert one_by_one == PackedStrings(STRINGS) and one_by_one != "".join(STRINGS)
    with pytest.raises(OverflowError):
        PackedNumbers("i").append(2**40)


def test_what_a_spawned_process_gets_is_small_and_a_copy_is_whole(tmp_path: Path, spawning: None) -> None:
    write_mals(tmp_path, 2000)
    files = sorted((tmp_path / "MALS/gene_attrs").iterdir())
    records = load_mals(files, tmp_path)
    expected = list(records)
    for _ in range(2):  # the second process gets the same memory
        assert len(ForkingPickler.dumps(records)) < 4000
        assert records == expected
    set_spawning_popen(None)
    assert copy.deepcopy(records) == expected
    assert copy.deepcopy(PackedStrings()) == []


def test_forked_and_spawned_processes_read_the_same_records_as_json(tmp_path: Path) -> None:
    write_sda(tmp_path, 50)
    write_mals(tmp_path, 100)
    write_syncpr(tmp_path, 30)
    sda_files, mals_files = (sorted((tmp_path / part).iterdir()) for part in ("data/sda", "MALS/gene_attrs"))
    sda, mals, syncpr = load_sda(sda_files, "i"), load_mals(mals_files, "i"), load_syncpr(tmp_path / "SynCPR")
    stored = [record for file in (*sda_files, *mals_files) for record in json.loads(file.read_bytes())]
    stored += json.loads((tmp_path / "SynCPR/SynCPR.json").read_bytes())
    whole: Any = ConcatDataset([sda.records, mals, syncpr])  # type: ignore[list-item]
    here = [whole[place] for place in range(len(whole))]
    for record, fields in zip(here, stored, strict=True):
        for name in ("caption", "boxes", "logits", "phrases", "edit_caption", "cpr_id", "target_caption"):
            if name in fields:
                assert getattr(record, name) == fields[name]
        folder = tmp_path / "SynCPR" if "cpr_id" in fields else "i"
        for name, path in (("image", "image_path"), ("reference_image_path", "reference_image_path")):
            if name in fields:
                assert getattr(record, path) == f"{folder}/{fields[name]}"
    for method in ("fork", "spawn"):
        loader = DataLoader(whole, 16, num_workers=1, collate_fn=list, multiprocessing_context=method)
        assert [record for batch in loader for record in batch] == here


@pytest.mark.slow
def test_the_benchmark_measures_in_a_fresh_process(tmp_path: Path) -> None:
    write_syncpr(tmp_path, 2000)
    costs = in_fresh_process(load_syncpr, tmp_path / "SynCPR")
    assert len(costs) == 6 and costs["reading, CPU s"] > 0
    assert costs["private memory of a forked worker after an epoch, MiB"] < 100


# Annotation that is longer than what is parsed at a time.

LONG = "word " * 120_000


def text_of(count: int, **changed: Any) -> str:
    records = [
        {"image": f"{number}.png", "caption": f"{number} {LONG}", "image_id": number, "note": ["\u00fc", 'say: "x": {']}
        for number in range(count)
    ]
    records[-2] |= changed
    return json.dumps(records, ensure_ascii=False)


@pytest.mark.parametrize("changed", [{}, {"nested": {"a": {"b": 1}}, "caption": 'a "},{" :'}, {"caption": "\\"}])
def test_parts_of_a_long_file_make_a_whole(tmp_path: Path, changed: dict[str, Any]) -> None:
    text = text_of(40, **changed)
    for data in (text.encode("utf-8-sig"), text.replace('"image_id": 39', '"image_id"\n :39').encode()):
        (tmp_path / "a.json").write_bytes(data)
        records = load_mals(tmp_path / "a.json", "")
        assert [(one.image_path, one.caption, one.label) for one in records] == [
            (record["image"], record["caption"], number) for number, record in enumerate(json.loads(text))
        ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"image_id": 39', '"image_id": 39, "image_id": 39', "record 39 .*'image_id' is given twice"),
        ('"image_id": 39', '"image_id" : 39, "image_id": 39', "record 39 .*'image_id' is given twice"),
        ('"image_id": 39', '"image_id": 39, "\\\\": 1, "\\\\": 1', "record 39 .*is given twice"),
        ('"image_id": 39', '"image_id": NaN', "record 39 .*NaN is not a JSON value"),
        ('"image_id": 39', '"image_id": 1.5', "record 39 .*the key 'image_id' must hold"),
        ("}, {", "} {", "record 1 .*Expecting ',' or ']'"),
        ('{"]}]', '{"]},]', "line 1, column .* in record 40"),
        ('{"]}]', '{"]}, 3]', "record 40 .* is an integer, not an object"),
        ('{"]}]', '{"]}', "seems to be cut short"),
        ('{"]}]', '{"]}] x', "Extra data"),
    ],
)
def test_faults_in_the_last_part_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = text_of(40)
    assert old in text
    (tmp_path / "a.json").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(DatasetError, match=words):
        load_mals(tmp_path / "a.json", "")
