"""`tbps-compare` with tiny CLIP models, and `compare-toy` with the papers' smallest ones."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tbps_common.cli import compare_main, index_main
from tbps_world.tiny.clip import write_tiny_clip

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200)}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of three persons, queries of every kind, two models, and a gallery of both."""
    root = tmp_path_factory.mktemp("shop")
    rows = ["path,pid"]
    for colour, paint in COLOURS.items():
        for number in range(3):
            file = root / "pictures" / f"{colour}_{number}.png"
            file.parent.mkdir(exist_ok=True)
            picture = Image.new("RGB", (16, 32), paint)
            picture.paste((50 * number, 90, 10), (0, 24, 16, 32))
            picture.save(file)
            rows.append(f"{file.name},{colour}")
    (root / "who.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    said = [[{"from": "gpt", "value": "Who?"}, {"from": "user", "value": f"A person, part {part}."}] for part in (1, 2)]
    queries = []
    for colour in COLOURS:
        queries.append({"text": f"a person in {colour}", "identity": colour})
        queries.append(
            {"image": f"pictures/{colour}_0.png", "text": "darker", "answers": [f"{colour}_2.png"], "person": colour}
        )
        queries.append({"dialogue": said, "identity": colour})
    (root / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)), encoding="utf-8")
    for seed in (0, 1):
        write_tiny_clip(root / f"clip_{seed}.pt", layers=1, vocab_size=49408, seed=seed)
        index = [
            "--model",
            f"clip:{root}/clip_{seed}.pt",
            "--images",
            str(root / "pictures"),
            "--out",
            str(root / "people.lance"),
        ]
        assert index_main([*index, "--metadata", str(root / "who.csv"), "--device", "cpu"]) == 0
    return root


@pytest.fixture(autouse=True)
def quick_timer() -> Iterator[None]:
    """The timer collects garbage before every run; of a test process's million objects that takes a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def compare(shop: Path, *more: str, models: tuple[str, ...] = ("clip_0.pt", "clip_1.pt")) -> int:
    flags = ["--gallery", str(shop / "people.lance"), "--queries", str(shop / "queries.jsonl"), "--device", "cpu"]
    flags += [word for name in models for word in ("--model", f"clip:{shop / name}")]
    return compare_main([*flags, "--identity", "pid", "--resamples", "50", *more])


def test_every_kind_of_query_is_a_task_of_its_own(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "comparison"
    assert compare(shop, "--join-dialogue", "--by_rounds", "--baselines", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    document = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert document["schema"] == "tbps-comparison/1" and document["pictures"] == 9
    tasks = document["tasks"]
    assert list(tasks) == ["text", "image+text", "dialogue, 1 round", "dialogue, 2 rounds"]
    ways = ["", ", picture alone", ", sentence alone", ", sum of both"]
    models = [f"clip:{shop}/clip_{seed}.pt" for seed in (0, 1)]
    assert [entry["name"] for entry in tasks["image+text"]["models"]] == [m + way for m in models for way in ways]
    # CLIP's own answer to both is the sum of unit features, which ranks as the sum of scores does.
    first, *_, total = tasks["image+text"]["models"][:4]
    assert first["metrics"] == total["metrics"]
    for task, summary in tasks.items():
        assert (summary["queries"], summary["persons"]) == (3, 3)
        for place, entry in enumerate(summary["models"]):
            assert (entry["difference"] is None) == (place == 0)
            assert all(one["low"] <= one["value"] <= one["high"] for one in entry["metrics"].values())
            assert len(entry["cmc"]) == 20 and entry["cmc"][0] == pytest.approx(entry["metrics"]["R1"]["value"])
            assert entry["cmc"][8:] == pytest.approx([100] * 12)
            assert entry["picture_bytes"] == 64 * 4 and entry["search_ms"] > 0 and len(entry["fingerprint"]) == 64
        assert f"{task}: 3 queries for 3 persons" in printed
        assert (out / f"cmc_{task.replace(', ', '_').replace(' ', '_')}.png").is_file()
    assert (out / "comparison.txt").read_text(encoding="utf-8").splitlines()[1] in printed


def test_what_cannot_be_asked_is_said(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(shop, "--out", str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert "dialogue: left out clip:" in captured.out and "which does not take a dialogue" in captured.out
    assert "none of the models takes a dialogue" in captured.err and "--join-dialogue" in captured.err
    assert not (tmp_path / "out" / "comparison.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--identity", "person"), "--identity person is not a column of"),
        (("--where", "pid = 'nobody'"), "that fit --where"),
        (("--where", "pid ="), "--where"),
        (("--where", "pid <> 'red'"), "line 1: no picture of"),
        (("--queries", "absent.jsonl"), "--queries absent.jsonl cannot be read"),
        (("--gallery", "absent.lance"), "absent.lance does not exist"),
        (("--model", "clip:absent.pt"), "absent.pt"),
    ],
)
def test_bad_input_is_one_line(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    assert compare(shop, "--out", str(tmp_path / "out"), *more, models=("clip_0.pt",)) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert words in printed[-1] and "Traceback" not in printed[-1]
    assert not list(tmp_path.rglob("*.json"))


def test_models_must_hold_the_same_pictures(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = str(tmp_path / "people.lance")
    for seed, images in enumerate((str(shop / "pictures"), str(tmp_path / "fewer.txt"))):
        (tmp_path / "fewer.txt").write_text(f"{shop}/pictures/red_0.png\n{shop}/pictures/red_1.png\n", encoding="utf-8")
        flags = ["--model", f"clip:{shop}/clip_{seed}.pt", "--images", images, "--out", gallery, "--device", "cpu"]
        assert index_main([*flags, "--metadata", str(shop / "who.csv")]) == 0
    assert compare(shop, "--gallery", gallery, "--out", str(tmp_path / "out")) == 2
    assert "holds other pictures of clip:" in capsys.readouterr().err
