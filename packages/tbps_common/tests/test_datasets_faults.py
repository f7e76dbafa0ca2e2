"""Every reader on every kind of bad annotation file: one DatasetError of one line that names file, place and cause."""

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbps_common.datasets import (
    CUHKPEDES,
    ICFGPEDES,
    ITCPR,
    DatasetError,
    RSTPReid,
    load_chatpedes,
    load_mals,
    load_processed_eval,
    load_processed_train,
    load_sda,
    load_syncpr,
    read_json,
)

TURN = [{"from": "gpt", "value": "What is he wearing?"}, {"from": "user", "value": "A red coat."}]


@dataclass
class Layout:
    """How to load one layout under a root, where its annotation file lies, and a valid record."""

    file: str
    load: Callable[[Path], Any]
    record: dict[str, Any]
    path_keys: tuple[str, ...]
    wrong: dict[str, list[Any]]  # key -> values that must be refused


NOT_TEXT = [None, 3, 1.5, True, ["a"], {}]
NOT_TEXTS = [None, "a", 3, {}, [None], [["a"]], ["a", 5], ["\ud800"]]
NOT_NUMBER = [None, 1.5, True, "one", "", "1.0", " 1", "1_0", "٣", [1], {}, 10**30, "9" * 30]
NOT_IDENTITY = [None, 1.5, True, [1], {}]
RAW = {"split": NOT_TEXT, "captions": NOT_TEXTS, "id": NOT_NUMBER}

LAYOUTS = {
    "cuhk": Layout(
        "CUHK-PEDES/reid_raw.json",
        lambda root: CUHKPEDES(root, verbose=False).train,
        {"split": "train", "captions": ["a", "b"], "file_path": "cam_a/1.png", "processed_tokens": [["a"]], "id": 1},
        ("file_path",),
        RAW | {"file_path": NOT_TEXT},
    ),
    "icfg": Layout(
        "ICFG-PEDES/ICFG-PEDES.json",
        lambda root: ICFGPEDES(root, verbose=False).train,
        {"split": "train", "captions": ["a"], "file_path": "train/1.png", "processed_tokens": [["a"]], "id": 0},
        ("file_path",),
        RAW | {"file_path": NOT_TEXT},
    ),
    "rstp": Layout(
        "RSTPReid/data_captions.json",
        lambda root: RSTPReid(root, verbose=False).test["img_paths"],
        {"id": 0, "img_path": "0000_c14_0031.jpg", "captions": ["a", "b"], "split": "test"},
        ("img_path",),
        RAW | {"img_path": NOT_TEXT},
    ),
    "processed-train": Layout(
        "train.json",
        lambda root: load_processed_train(root / "train.json", root).image_paths,
        {"image": "cam_a/1.png", "caption": "a woman", "image_id": 12},
        ("image",),
        {"image": NOT_TEXT, "caption": NOT_TEXT, "image_id": NOT_IDENTITY},
    ),
    "processed-eval": Layout(
        "test.json",
        lambda root: load_processed_eval(root / "test.json", root).image_paths,
        {"image": "cam_b/7.png", "caption": ["a woman", "b"], "image_id": 12},
        ("image",),
        {"image": NOT_TEXT, "caption": NOT_TEXTS, "image_id": NOT_NUMBER},
    ),
    "sda": Layout(
        "sda.json",
        lambda root: load_sda([root / "sda.json"], root).records,
        {
            "image": "c_0_5000/0_0.jpg",
            "boxes": [[0.5, 0.5, 0.9, 0.9], [0.5, 0.4, 0.8, 1]],
            "logits": [0.75, 0.4],
            "phrases": ["a man", "a shirt"],
            "caption": "a man",
            "image_id": 0,
        },
        ("image",),
        {
            "image": NOT_TEXT,
            "caption": NOT_TEXT,
            "image_id": NOT_IDENTITY,
            "boxes": [None, "a", [], [[0.5, 0.5, 0.9, 0.9]], [[0, 0, 1]] * 2, [[0, 0, 1, "1"]] * 2, [0.5] * 2],
            "logits": [None, "a", [], [0.5], ["0.5", 0.5], [[0.5], 0.5], [True, 0.5]],
            "phrases": [None, "a", [], ["a"], ["a", 5], ["a", "b", "c"], ["a", "\udfff"]],
        },
    ),
    "syncpr": Layout(
        "SynCPR.json",
        load_syncpr,
        {
            "reference_caption": "a",
            "target_caption": "b",
            "reference_image_path": "test2/sub_img/img_left/1-1_left.png",
            "target_image_path": "test2/sub_img/img_right/1-1_right.png",
            "edit_caption": "Wearing a skirt.",
            "cpr_id": 0,
        },
        ("reference_image_path", "target_image_path"),
        {
            "reference_image_path": NOT_TEXT,
            "target_image_path": NOT_TEXT,
            "edit_caption": [*NOT_TEXT, "\ud83d"],
            "cpr_id": NOT_NUMBER,
        },
    ),
    "itcpr-query": Layout(
        "query.json",
        lambda root: ITCPR(root).query["img_paths"],
        {
            "file_path": "Celeb-reID/001/1_1_0.jpg",
            "datasets": "Celeb-reID",
            "person_id": 1,
            "instance_id": 1,
            "caption": "Wearing a brown shirt.",
        },
        ("file_path",),
        {"file_path": NOT_TEXT, "person_id": NOT_NUMBER, "instance_id": NOT_NUMBER, "caption": NOT_TEXT},
    ),
    "itcpr-gallery": Layout(
        "gallery.json",
        lambda root: ITCPR(root).gallery["img_paths"],
        {"file_path": "Celeb-reID/001/1_1_0.jpg", "datasets": "Celeb-reID", "person_id": 1, "instance_id": -1},
        ("file_path",),
        {"file_path": NOT_TEXT, "person_id": NOT_NUMBER, "instance_id": NOT_NUMBER},
    ),
    "chatpedes": Layout(
        "train_reid.json",
        lambda root: load_chatpedes(root / "train_reid.json", root),
        {"id": 12, "file_path": "cam_a/1.png", "chats": [TURN, TURN]},
        ("file_path",),
        {
            "id": NOT_IDENTITY,
            "file_path": NOT_TEXT,
            "chats": [
                None,
                "a",
                {},
                [3],
                [[[3]]],
                [TURN[:1]],
                [TURN + TURN[:1]],
                [TURN[::-1]],
                [[TURN], TURN[0]],
                [[TURN[0], {"from": "user"}]],
                [[TURN[0], {"from": "user", "value": 3}]],
                [[TURN[0], {"from": "user", "value": "\ud800"}]],
                [[TURN[0], {"from": "system", "value": "a"}]],
                [[TURN[0], {"value": "a"}]],
            ],
        },
    ),
    "mals": Layout(
        "mals.json",
        lambda root: load_mals(root / "mals.json", root),
        {"image": "gene_crop/c_g_a_0/0.jpg", "caption": "a young boy", "image_id": "c_g_a_0_0", "label": [1, 0, -1]},
        ("image",),
        {"image": NOT_TEXT, "caption": NOT_TEXT, "image_id": NOT_IDENTITY},
    ),
}


def prepare(root: Path, layout: Layout, data: bytes) -> Path:
    """Write `data` as the annotation file, beside whatever else the layout needs."""
    path = root / layout.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent != root:
        (path.parent / "imgs").mkdir(exist_ok=True)
    for other in ("query.json", "gallery.json"):
        (root / other).write_text("[]", encoding="utf-8")
    path.write_bytes(data)
    return path


def refusal(root: Path, layout: Layout, data: bytes) -> str:
    """The message with which the file is refused."""
    path = prepare(root, layout, data)
    with pytest.raises(DatasetError) as caught:
        layout.load(root)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith("."), message
    return message


def valid(layout: Layout) -> str:
    return json.dumps([layout.record, layout.record], indent=1)


BAD_FILES: dict[str, tuple[Callable[[str], bytes], str]] = {
    "empty": (lambda text: b"", "is empty"),
    "blank": (lambda text: b" \n\t ", "is empty"),
    "only-bom": (lambda text: b"\xef\xbb\xbf", "is empty"),
    "utf-16": (lambda text: text.encode("utf-16"), "not UTF-8"),
    "utf-16-be": (lambda text: text.encode("utf-16-be"), "not UTF-8"),
    "utf-32": (lambda text: text.encode("utf-32"), "not UTF-8"),
    "latin-1": (lambda text: text.replace("a", "é", 1).encode("latin-1"), "not UTF-8: a wrong byte on line"),
    "object-at-top": (lambda text: b'{"images": ' + text.encode() + b"}", "holds an object at the top"),
    "string-at-top": (lambda text: b'"list"', "holds a string at the top"),
    "number-at-top": (lambda text: b" 12", "holds an integer at the top"),
    "null-at-top": (lambda text: b"null", "holds null at the top"),
    "list-of-lists": (lambda text: b"[" + text.encode() + b"]", "record 0 .* is a list, not an object"),
    "list-of-strings": (lambda text: text[:-1].encode() + b', "x"]', "record 2 .* is a string, not an object"),
    "nan": (lambda text: text[:-3].encode() + b', "score": NaN}]', "record 1 .*NaN is not a JSON value"),
    "infinity": (lambda text: text[:-3].encode() + b', "score": [-Infinity]}]', "record 1 .*-Infinity is not"),
    "doubled-key": (lambda text: text[:-3].encode() + b', "x": 1, "x": 1}]', "record 1 .*'x' is given twice"),
    "nested": (lambda text: b'[{"a": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}]", "nested too deeply in record 0"),
    "nested-at-top": (lambda text: b"[" * 1_000_000, "nested too deeply"),
    "long-number": (
        lambda text: text[:-3].encode() + b', "n": ' + b"9" * 5000 + b"}]",
        "number is too long in record 1",
    ),
    "trailing-comma": (lambda text: text[:-1].encode() + b",]", "line .*, column .* in record 2"),
    "missing-comma": (lambda text: text.replace("\n },", "\n }", 1).encode(), "in record 1 .*Expecting ',' or ']'"),
    "trailing-text": (lambda text: text.encode() + b"x", "Extra data"),
    "two-lists": (lambda text: text.encode() + text.encode(), "Extra data"),
    "json-lines": (lambda text: json.dumps(json.loads(text)[0]).encode() + b"\n{}", "Extra data"),
    "single-quotes": (lambda text: text.replace('"', "'").encode(), "in record 0 .*double quotes"),
    "comment": (lambda text: b"[ // persons\n" + text[1:].encode(), "line 1, column 3 in record 0"),
    "control-character": (lambda text: text.replace('": "', '": "\x01', 1).encode(), "Invalid control character"),
    "bad-escape": (lambda text: text.replace('": "', '": "\\q', 1).encode(), "Invalid .escape"),
    "python-literals": (lambda text: text[:-3].encode() + b', "x": None}]', "in record 1 .*Expecting value"),
    "html": (lambda text: b"<!DOCTYPE html><html>quota exceeded</html>", "line 1, column 1"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files(tmp_path: Path, layout: str, fault: str) -> None:
    spoil, expected = BAD_FILES[fault]
    message = refusal(tmp_path, LAYOUTS[layout], spoil(valid(LAYOUTS[layout])))
    assert re.search(expected, message), message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncations_are_refused(tmp_path: Path, layout: str) -> None:
    data = valid(LAYOUTS[layout]).encode()
    for end in range(1, len(data), 7):
        message = refusal(tmp_path, LAYOUTS[layout], data[:end])
        assert "cut short" in message or "empty" in message or "line" in message, message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_end_of_a_cut_file_is_called_so(tmp_path: Path, layout: str) -> None:
    text = valid(LAYOUTS[layout])
    assert "seems to be cut short, get it again" in refusal(
        tmp_path, LAYOUTS[layout], text[: text.index("}") + 1].encode()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_valid_files_load_with_and_without_a_byte_order_mark(tmp_path: Path, layout: str) -> None:
    text = valid(LAYOUTS[layout])
    prepare(tmp_path, LAYOUTS[layout], text.encode())
    plain = LAYOUTS[layout].load(tmp_path)
    assert len(plain) >= 2
    for data in (text.encode("utf-8-sig"), ("\r\n " + text.replace("\n", "\r\n") + "\n\n").encode()):
        prepare(tmp_path, LAYOUTS[layout], data)
        assert LAYOUTS[layout].load(tmp_path) == plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_list_is_no_fault(tmp_path: Path, layout: str) -> None:
    prepare(tmp_path, LAYOUTS[layout], b" [ ] ")
    assert len(LAYOUTS[layout].load(tmp_path)) == 0


REQUIRED = [(name, key) for name, layout in LAYOUTS.items() for key in layout.wrong]


@pytest.mark.parametrize(("layout", "key"), REQUIRED)
def test_missing_keys(tmp_path: Path, layout: str, key: str) -> None:
    bad = {k: v for k, v in LAYOUTS[layout].record.items() if k != key}
    message = refusal(tmp_path, LAYOUTS[layout], json.dumps([LAYOUTS[layout].record, bad]).encode())
    assert f"record 1 (counted from 0): the key {key!r} is missing" in message


@pytest.mark.parametrize(("layout", "key"), REQUIRED)
def test_wrong_values(tmp_path: Path, layout: str, key: str) -> None:
    for value in LAYOUTS[layout].wrong[key]:
        bad = copy.deepcopy(LAYOUTS[layout].record) | {key: value}
        message = refusal(tmp_path, LAYOUTS[layout], json.dumps([LAYOUTS[layout].record, bad]).encode())
        assert "record 1 (counted from 0)" in message, (value, message)
        # Lists of unequal length are reported at the boxes, whichever of the three is wrong.
        assert repr(key) in message or "'boxes' must be as long as" in message, (value, message)


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
@pytest.mark.parametrize("key", ["boxes", "logits"])
def test_numbers_that_overflow_to_infinity(tmp_path: Path, key: str, number: str) -> None:
    text = json.dumps([LAYOUTS["sda"].record]).replace("0.75" if key == "logits" else "0.5,", number + ",", 1)
    text = text.replace(",,", ",")
    assert f"the key {key!r} must hold" in refusal(tmp_path, LAYOUTS["sda"], text.encode())


@pytest.mark.parametrize(
    ("layout", "id_key"), [("cuhk", "id"), ("processed-eval", "image_id"), ("itcpr-query", "person_id")]
)
def test_ids_may_be_digit_strings(tmp_path: Path, layout: str, id_key: str) -> None:
    prepare(tmp_path, LAYOUTS[layout], json.dumps([LAYOUTS[layout].record | {id_key: 1}]).encode())
    plain = LAYOUTS[layout].load(tmp_path)
    prepare(tmp_path, LAYOUTS[layout], json.dumps([LAYOUTS[layout].record | {id_key: "0001"}]).encode())
    assert LAYOUTS[layout].load(tmp_path) == plain


CLIMBS = [
    "../x.png",
    "../../etc/passwd",
    "cam_a/../../x.png",
    "a/b/../../../x.png",
    "./../x.png",
    "..",
    "/etc/passwd",
    "//server/share/x.png",
    "\\windows\\x.png",
    "..\\x.png",
    "cam_a\\..\\..\\x.png",
    "cam_a/..\\../x.png",
    "C:\\x.png",
    "c:x.png",
    "D:/x.png",
    "a\0b.png",
    "",
    ".",
    "cam_a/..",
    "cam_a/",
    "a\ud800.png",
]


@pytest.mark.parametrize(("layout", "key"), [(name, key) for name, one in LAYOUTS.items() for key in one.path_keys])
def test_names_that_leave_the_folder(tmp_path: Path, layout: str, key: str) -> None:
    for name in CLIMBS:
        bad = LAYOUTS[layout].record | {key: name}
        message = refusal(tmp_path, LAYOUTS[layout], json.dumps([LAYOUTS[layout].record, bad]).encode())
        assert f"record 1 (counted from 0): the key {key!r} is {name!r}, which" in message


@pytest.mark.parametrize(
    "name", ["a..b.png", "..a/b.png", "a/...png", "a b/c.png", "人/图.png", ".hidden/a.png", "a~b.png"]
)
@pytest.mark.parametrize("layout", ["processed-train", "mals"])
def test_odd_names_that_stay_inside_are_joined_unchanged(tmp_path: Path, layout: str, name: str) -> None:
    prepare(tmp_path, LAYOUTS[layout], json.dumps([LAYOUTS[layout].record | {"image": name}]).encode())
    first = LAYOUTS[layout].load(tmp_path)[0]
    assert (first if isinstance(first, str) else first.image_path) == f"{tmp_path}/{name}"


def test_back_slashes_inside_become_separators(tmp_path: Path) -> None:
    prepare(tmp_path, LAYOUTS["mals"], json.dumps([LAYOUTS["mals"].record | {"image": "gene_crop\\a\\0.jpg"}]).encode())
    assert load_mals(tmp_path / "mals.json", tmp_path)[0].image_path == f"{tmp_path}/gene_crop/a/0.jpg"


fragments = st.lists(
    st.sampled_from(["..", ".", "a", "b.png", "", "C:", "\\", "/", "\\..", "a..", "\0", "ü"]), max_size=7
)


@settings(max_examples=400, deadline=None)
@given(fragments, st.sampled_from(["/", "\\", ""]))
def test_no_accepted_name_leaves_the_folder(parts: list[str], separator: str) -> None:
    from tbps_common.datasets import Folder

    name = separator.join(parts)
    folder = Folder("/data/imgs")
    if folder.problem(name) is None:
        path = os.path.normpath(folder.join(name).replace("\\", "/"))
        assert path.startswith("/data/imgs/") and path == os.path.normpath("/data/imgs/" + name.replace("\\", "/"))


def test_folders_pipes_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="absent.json does not exist"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(DatasetError, match="is a folder or a device, not a JSON file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DatasetError, match="is a folder or a device"):
        load_mals(tmp_path / "pipe.json", tmp_path)
    with pytest.raises(DatasetError, match="No annotation file is given"):
        load_mals([], tmp_path)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "人"]}, [], 3, "x", None])
def test_read_json_returns_any_value(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value), encoding="utf-8-sig")
    assert read_json(path) == value


@pytest.mark.parametrize(
    "fault", ["empty", "utf-16", "nan", "doubled-key", "nested-at-top", "long-number", "trailing-comma"]
)
def test_read_json_names_the_place(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(BAD_FILES[fault][0](valid(LAYOUTS["mals"])))
    with pytest.raises(DatasetError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    if fault == "trailing-comma":
        assert re.search(r"line \d+, column \d+", str(caught.value))
