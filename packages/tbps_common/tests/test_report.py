"""The evaluation file and the pictures of results."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tbps_common.errors import InputError
from tbps_common.ranking import retrieve
from tbps_common.report import (
    Hit,
    Picture,
    PictureRow,
    RankedQuery,
    cmc_curve,
    evaluation_from_result,
    picture_grid,
    ranked_list,
    read_evaluation,
    write_evaluation,
)
from tbps_common.report.published import PublishedRow, compare_with_published, published_report

GREEN, RED, GREY = (34, 139, 80), (200, 62, 62), (150, 156, 164)


def evaluation(**changes: Any) -> dict[str, Any]:
    fields = {
        "package": "cmlfa",
        "dataset": "CUHK-PEDES",
        "split": "test",
        "metrics": {"t2i": {"R1": 73.379, "mAP": torch.tensor(66.13), "mFR": 123.5}},
        "counts": {"queries": 6156, "gallery": np.int64(3074)},
        "settings": {"batch_size": 512, "lfa_attention": "batch", "img_size": (384, 128)},
    }
    return {**fields, **changes}


class TestEvaluation:
    def test_what_is_written_is_read_back(self, tmp_path: Path) -> None:
        written = write_evaluation(
            tmp_path / "run" / "evaluation.json",
            **evaluation(checkpoint=Path("logs/best.pth"), fingerprint="0" * 64, cmc={"t2i": [73.4, 80]}, seconds=1.5),
        )
        read = read_evaluation(tmp_path / "run" / "evaluation.json")
        assert read == written
        assert read["schema"] == "tbps-evaluation/1"
        assert read["metrics"]["t2i"]["mFR"] == 123.5
        assert read["settings"]["img_size"] == [384, 128]
        assert read["checkpoint"] == "logs/best.pth"
        assert read["environment"]["torch"] == str(torch.__version__) and read["environment"]["device"]

    def test_the_same_measurement_writes_the_same_file(self, tmp_path: Path) -> None:
        for name in ("a.json", "b.json"):
            write_evaluation(tmp_path / name, **evaluation())
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()

    def test_from_a_ranking_result(self, tmp_path: Path) -> None:
        gallery = torch.eye(4)
        result = retrieve(gallery[[0, 1, 3]], gallery, [0, 1, 2], [0, 1, 2, 2])
        read = evaluation_from_result(
            tmp_path / "a.json", {"t2i": result}, gallery=4, package="p", dataset="d", split="test", settings={}
        )
        assert read == read_evaluation(tmp_path / "a.json")
        assert read["counts"] == {"queries": 3, "gallery": 4}
        assert read["metrics"]["t2i"] == pytest.approx(result.metrics)
        assert read["cmc"]["t2i"] == pytest.approx(result.cmc.tolist()) and len(read["cmc"]["t2i"]) == 10

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"metrics": {"t2i": {"R1": float("nan")}}}, "metrics.t2i.R1"),
            ({"metrics": {"t2i": {"R1": 101.0}}}, "metrics.t2i.R1"),
            ({"metrics": {"t2i": {"mAP": -0.1}}}, "metrics.t2i.mAP"),
            ({"metrics": {}}, "metrics"),
            ({"metrics": {"t2i": {}}}, "metrics.t2i"),
            ({"counts": {"queries": 3}}, "counts"),
            ({"counts": {"queries": -1, "gallery": 3}}, "counts.queries"),
            ({"cmc": {"t2i": [50.0, float("inf")]}}, "cmc.t2i"),
            ({"seconds": -1.0}, "seconds"),
            ({"package": ""}, "package"),
        ],
    )
    def test_numbers_that_cannot_be_are_not_written(self, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
        with pytest.raises(ValueError, match=f"'{named}'"):
            write_evaluation(tmp_path / "a.json", **evaluation(**changes))
        assert os.listdir(tmp_path) == []

    def test_a_setting_json_cannot_hold_is_a_type_error(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError):
            write_evaluation(tmp_path / "a.json", **evaluation(settings={"device": torch.device("cpu")}))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: "",
            lambda text: text[: len(text) // 2],
            lambda text: "[]",
            lambda text: "null",
            lambda text: "[" * 100_000,
            lambda text: text.replace("73.379", "NaN"),
            lambda text: text.replace("73.379", '"73.379"'),
            lambda text: text.replace("73.379", "true"),
            lambda text: text.replace("tbps-evaluation/1", "tbps-evaluation/9"),
            lambda text: text.replace('"counts"', '"count"'),
            lambda text: text.replace('"metrics"', '"metric"'),
            lambda text: text.replace('"settings"', '"setting"'),
            lambda text: text.replace('"environment"', '"surroundings"'),
            lambda text: text.replace('"CUHK-PEDES"', "7"),
        ],
    )
    def test_a_damaged_file_is_one_sentence_with_its_name(self, tmp_path: Path, damage: Callable[[str], str]) -> None:
        write_evaluation(tmp_path / "a.json", **evaluation())
        text = (tmp_path / "a.json").read_text(encoding="utf-8")
        (tmp_path / "a.json").write_text(damage(text), encoding="utf-8")
        with pytest.raises(InputError, match=r"a\.json") as caught:
            read_evaluation(tmp_path / "a.json")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [json.dumps({}).encode("utf-16"), b"\xff\xfe\x00", b"\x00"])
    def test_other_encodings(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.json"):
            read_evaluation(tmp_path / "a.json")

    def test_absent_file_and_folder(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.json", tmp_path):
            with pytest.raises(InputError, match="cannot be read"):
                read_evaluation(path)


@pytest.fixture
def people(tmp_path: Path) -> list[Path]:
    """Plain pictures in shapes that pedestrian crops come in."""
    paths = []
    for number, size in enumerate([(64, 128), (128, 384), (200, 200), (30, 400), (1, 1)]):
        paths.append(tmp_path / f"person{number}.png")
        Image.new("RGB", size, (0, 0, 40 + 40 * number)).save(paths[-1])
    return paths


def colours(path: Path) -> dict[tuple[int, ...], int]:
    """Pixel count of each colour."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(colour): count for colour, count in zip(found.tolist(), counts.tolist())}


class TestRankedList:
    def test_frames_tell_right_wrong_and_unknown(self, tmp_path: Path, people: list[Path]) -> None:
        frames = {}
        for correct, colour in ((True, GREEN), (False, RED), (None, GREY)):
            target = tmp_path / f"{correct}.png"
            ranked_list(target, [RankedQuery(text="a man", hits=[Hit(people[0], 0.5, correct)])])
            frames[colour] = colours(target)
        for colour, found in frames.items():
            assert found[colour] > 2000
            assert not [other for other in (GREEN, RED, GREY) if other != colour and found.get(other, 0) > 200]

    def test_the_sheet_grows_by_hits_and_queries(self, tmp_path: Path, people: list[Path]) -> None:
        def size(queries: int, hits: int, **options: Any) -> tuple[int, int]:
            row = RankedQuery(text="a man", hits=[Hit(people[number % 5], 1 / (number + 1)) for number in range(hits)])
            with Image.open(ranked_list(tmp_path / "a.png", [row] * queries, **options)) as picture:
                return picture.size

        width, height = size(1, 2)
        assert size(1, 3)[0] > width and size(2, 2)[1] > height
        assert size(1, 9, columns=2) == (width, height)
        assert size(1, 2, title="Best images")[1] > height

    def test_pictures_keep_their_proportions(self, tmp_path: Path, people: list[Path]) -> None:
        path = ranked_list(tmp_path / "a.png", [RankedQuery(image=people[1], hits=[Hit(people[0], 0.1)])])
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        for person, (width, height) in ((1, (128, 384)), (0, (64, 128))):
            rows, columns = np.nonzero((pixels == (0, 0, 40 + 40 * person)).all(axis=2))
            drawn = (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
            assert drawn == pytest.approx(height / width, rel=0.03)

    @pytest.mark.parametrize(
        "text",
        ["word " * 2000, "x" * 5000, "一个穿着红色外套的女人" * 50, "a\x00b\n\tc\u202e", " ", "\U0001f600" * 200],
    )
    def test_any_text_stays_in_its_column(self, tmp_path: Path, people: list[Path], text: str) -> None:
        path = ranked_list(tmp_path / "a.png", [RankedQuery(text=text, hits=[Hit(people[0], 0.1, True)])] * 2)
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        left_of_frame = np.nonzero((pixels == GREEN).all(axis=2))[1].min()
        gap = pixels[:, left_of_frame - 10 : left_of_frame]
        rule = (224, 227, 231)
        assert ((gap == 255).all(axis=2) | (gap == rule).all(axis=2)).all()
        assert (pixels[-3:] == 255).all()

    def test_an_unreadable_picture_does_not_stop_the_sheet(self, tmp_path: Path, people: list[Path]) -> None:
        (tmp_path / "broken.jpg").write_bytes(b"nothing")
        hits = [Hit(tmp_path / "gone.jpg", 0.9, True), Hit(tmp_path / "broken.jpg", 0.8, False), Hit(people[0], 0.7)]
        with Image.open(ranked_list(tmp_path / "a.png", [RankedQuery(text="a", hits=hits)])) as picture:
            assert picture.width > 3 * 112

    def test_query_and_target_pictures_are_drawn(self, tmp_path: Path, people: list[Path]) -> None:
        query = RankedQuery("now in green", people[0], [Hit(people[1], 0.1)], truth=people[2])
        found = colours(ranked_list(tmp_path / "a.png", [query]))
        assert all(found[0, 0, 40 + 40 * number] > 1000 for number in range(3))

    def test_a_query_without_hits_is_drawn(self, tmp_path: Path) -> None:
        assert ranked_list(tmp_path / "a.png", [RankedQuery(text="nobody")]).is_file()

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        with pytest.raises(InputError):
            ranked_list(tmp_path / "a.png", [])
        with pytest.raises(InputError):
            ranked_list(tmp_path / "a.png", [RankedQuery(text="a")], columns=0)
        assert os.listdir(tmp_path) == []


class TestPictureGrid:
    def test_pictures_in_memory_and_in_files_with_coloured_words(self, tmp_path: Path, people: list[Path]) -> None:
        rows = [
            PictureRow([Picture(people[0], "original"), None, Picture(Image.new("RGB", (40, 90), (1, 2, 3)))]),
            PictureRow(
                [Picture(people[3], ("edited " * 20, "teal"), note="0.5")], [("a man in ", "black"), ("red", "red")]
            ),
        ]
        found = colours(picture_grid(tmp_path / "a.png", rows, title="Edits", cell=(60, 120)))
        assert found[1, 2, 3] > 58 * 100 and found[0, 0, 40] > 58 * 100
        assert found[255, 0, 0] > 10 and found[0, 128, 128] > 10

    def test_an_empty_cell_keeps_its_place(self, tmp_path: Path, people: list[Path]) -> None:
        picture = Picture(people[0])
        paths = [tmp_path / "a.png", tmp_path / "b.png"]
        picture_grid(paths[0], [PictureRow([picture, None]), PictureRow([None, picture])])
        picture_grid(paths[1], [PictureRow([picture, picture]), PictureRow([None, picture])])
        arrays = [np.asarray(Image.open(path)) for path in paths]
        assert arrays[0].shape == arrays[1].shape
        left, right = np.split(arrays[0] != arrays[1], [arrays[0].shape[1] // 2], axis=1)
        assert not left.any() and right.any()

    def test_a_long_label_does_not_reach_the_next_cell(self, tmp_path: Path, people: list[Path]) -> None:
        row = PictureRow([Picture(people[0], "x" * 100), None])
        pixels = np.asarray(Image.open(picture_grid(tmp_path / "a.png", [row], cell=(80, 100))))
        assert (pixels[:, 18 + 80 :] == 255).all()

    def test_no_row(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="at least one row"):
            picture_grid(tmp_path / "a.png", [])


class TestCurve:
    @pytest.mark.parametrize("curve", [[100.0], [1.0, 2.0, 3.5], list(np.linspace(0, 100, 200)), [0.0, 0.0]])
    def test_a_png_is_written(self, tmp_path: Path, curve: list[float]) -> None:
        path = cmc_curve(tmp_path / "cmc.png", {"t2i": curve, "i2t": curve[:1]}, title="CMC")
        assert len(colours(path)) > 10
        assert os.listdir(tmp_path) == ["cmc.png"]

    def test_every_curve_is_drawn(self, tmp_path: Path) -> None:
        one = colours(cmc_curve(tmp_path / "a.png", {"t2i": [50.0, 60.0]}))
        two = colours(cmc_curve(tmp_path / "a.png", {"t2i": [50.0, 60.0], f"clip:/{'far/' * 60}a.pt": [70.0, 90.0]}))
        orange = (255, 127, 14)
        assert orange not in one and two[orange] > 500

    @pytest.mark.parametrize("curves", [{}, {"t2i": []}])
    def test_nothing_to_draw(self, tmp_path: Path, curves: dict[str, list[float]]) -> None:
        with pytest.raises(InputError):
            cmc_curve(tmp_path / "a.png", curves)


class TestPublished:
    """A made-up row for three queries, of which two are found at rank 1."""

    ROW = PublishedRow(
        "d", "t2i", 3, 4, {"R1": 33.3, "mAP": 70.0}, source="a paper", weights="its own", protocol="fair"
    )
    MEASURED: dict[str, Any] = {
        "dataset": "d",
        "split": "test",
        "metrics": {"t2i": {"R1": 200 / 3, "R5": 100.0, "mAP": 70.0}},
        "counts": {"queries": 3, "gallery": 4},
    }

    def test_the_difference_is_given_in_percent_and_in_queries(self, tmp_path: Path) -> None:
        written = write_evaluation(tmp_path / "a.json", package="p", settings={}, published=[self.ROW], **self.MEASURED)
        (entry,) = written["published"]
        assert entry["metrics"]["R1"] == {
            "published": 33.3,
            "difference": pytest.approx(33.3667, abs=1e-3),
            "queries": 1,
        }
        assert entry["metrics"]["mAP"] == {"published": 70.0, "difference": 0.0}
        assert read_evaluation(tmp_path / "a.json") == written
        text, status = published_report(written["published"], None)
        assert status == 0 and "a paper" in text and "its own" in text and "fair" in text
        assert [cell.strip() for cell in text.splitlines()[5].split("|")[1:-1]] == [
            "R1",
            "33.30",
            "66.67",
            "+33.37",
            "+1",
        ]

    @pytest.mark.parametrize(
        "change",
        [
            {"dataset": "e"},
            {"split": "val"},
            {"counts": {"queries": 3, "gallery": 5}},
            {"metrics": {"i2t": {"R1": 1.0}}},
        ],
    )
    def test_another_data_set_size_or_task_is_not_compared(self, change: dict[str, Any], tmp_path: Path) -> None:
        assert compare_with_published([self.ROW], **{**self.MEASURED, **change}) == []
        assert published_report([], None) == ("", 0)
        text, status = published_report([], 0.2)
        assert status == 1 and "nothing could be compared" in text

    def test_one_row_has_to_agree_in_all_its_metrics(self) -> None:
        near = PublishedRow("d", "t2i", 3, 4, {"R1": 66.5, "mAP": 70.15}, "another", "its own", "fair")
        for rows, limit, status in (
            ([self.ROW], 0.2, 1),
            ([self.ROW, near], 0.2, 0),
            ([near], 0.16, 1),
            ([near], 0.17, 0),
        ):
            entries = compare_with_published(rows, **self.MEASURED)
            assert published_report(entries, limit)[1] == status, (rows, limit)
