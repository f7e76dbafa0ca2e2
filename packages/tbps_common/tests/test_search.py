"""Galleries and retrievers, with a model that anybody can compute: the mean colour of a picture."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from tbps_common.cli import index_main, search_main
from tbps_common.errors import GalleryError, InputError
from tbps_common.images import read_image
from tbps_common.ranking import similarity
from tbps_common.search.ann import build_index, measure_recall
from tbps_common.search.detect import VIDEOS, open_detector
from tbps_common.search.gallery import Gallery, list_galleries, open_gallery
from tbps_common.search.index import Counts, find_images, list_pictures, update_gallery
from tbps_common.search.metadata import read_metadata
from tbps_common.search.retriever import Feature, Features, Query, Retriever, open_retriever
from tbps_common.search.search import frame_of, picture_of, search

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def colour_model(fingerprint: str = "a" * 64, encoded: list[int] | None = None) -> Retriever:
    """Features are mean colours; a query is the name of a colour."""

    def transform(image: Image.Image) -> Tensor:
        return torch.tensor(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1))

    def encode_images(pictures: Tensor) -> Features:
        if encoded is not None:
            encoded.append(len(pictures))
        return {"colour": normalize(pictures + 1e-3, dim=1)}

    def encode_queries(queries: Sequence[Query]) -> Features:
        return {"colour": normalize(torch.tensor([COLOURS[query.text] for query in queries]).float(), dim=1)}

    return Retriever(
        name="colour:mean",
        queries=("text",),
        fingerprint=fingerprint,
        features=(Feature("colour", (3,)),),
        device=torch.device("cpu"),
        transform=transform,
        encode_images=encode_images,
        encode_queries=encode_queries,
        batch_size=4,
    )


def paint(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8), colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures that turn from red to blue, in two folders."""
    root = tmp_path / "pictures"
    for number in range(10):
        paint(root / ("a" if number < 5 else "b") / f"{number}.png", (255 - 25 * number, 0, 25 * number))
    return root


def index(out: Path, folder: Path | str, model: Retriever | None = None, **options: object) -> Counts:
    return update_gallery(str(out), model or colour_model(), list_pictures(str(folder)), **options)  # type: ignore[arg-type]


def names(gallery: Gallery, text: str, **options: object) -> list[str]:
    hits = search(gallery, colour_model(), [Query(text)], **options)[0]  # type: ignore[arg-type]
    return [os.path.basename(hit.path) for hit in hits]


def test_indexed_pictures_are_found_best_first(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "people.lance"
    assert str(index(out, folder)) == "added 10, updated 0, removed 0, skipped 0, total 10"
    gallery = open_gallery(out, colour_model())
    assert names(gallery, "red", topk=3) == ["0.png", "1.png", "2.png"]
    assert names(gallery, "blue", topk=20) == [f"{number}.png" for number in reversed(range(10))]
    assert names(gallery, "red", topk=3, where="path LIKE 'b/%'") == ["5.png", "6.png", "7.png"]


def test_only_what_changed_is_encoded(tmp_path: Path, folder: Path) -> None:
    out, encoded = tmp_path / "people.lance", []
    index(out, folder)
    model = colour_model(encoded=encoded)
    assert index(out, folder, model) == Counts(total=10)
    paint(folder / "a" / "0.png", (0, 255, 0))
    os.utime(folder / "a" / "0.png", (1, 1))  # older than before
    os.utime(folder / "b" / "9.png", (4e9, 4e9))  # in the future
    (folder / "a" / "1.png").unlink()
    paint(folder / "new.png", (1, 2, 3))
    assert index(out, folder, model) == Counts(added=1, updated=2, removed=1, total=10)
    assert index(out, folder, model) == Counts(total=10)
    assert encoded == [3]
    assert names(open_gallery(out, model), "green", topk=1) == ["0.png"]


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    for name, words in {"clip": "KIND:PLACE", "clop:x": "did you mean clip:x", "clip:": "KIND:PLACE"}.items():
        with pytest.raises(InputError, match=words):
            open_retriever(name)
    with pytest.raises(InputError, match="cannot search with a picture"):
        search(None, colour_model(), [Query(image=Image.new("RGB", (2, 2)))])  # type: ignore[arg-type]


def rows_of(out: Path) -> list[str]:
    """Keys of all rows, in their order."""
    return list_galleries(out)[0].table.search().select(["key"]).to_arrow()["key"].to_pylist()


def cli(*words: object) -> int:
    return index_main([str(word) for word in words])


class TestPictures:
    def test_one_name_per_picture(self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "people.lance"
        (tmp_path / "link").symlink_to(folder)
        (folder / "twice.png").symlink_to(folder / "a" / "0.png")
        assert index(out, folder).added == 10
        monkeypatch.chdir(tmp_path)
        listing = tmp_path / "list.txt"
        listing.write_text(
            f"pictures/a/0.png\n{folder}/a/1.png\nlink/a/2.png\npictures/b/../a/3.png\n", encoding="utf-8"
        )
        for source in ("pictures", "link", "list.txt", "pictures/a"):
            assert index(out, source) == Counts(total=10), source

    def test_what_cannot_be_read_is_counted_and_tried_once(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, bad = tmp_path / "people.lance", folder / "bad.png"
        bad.write_bytes(b"no picture")
        assert index(out, folder) == Counts(added=10, skipped=1, total=10)
        assert "bad.png" in capsys.readouterr().err
        assert index(out, folder) == Counts(skipped=1, total=10)
        assert "bad.png" not in capsys.readouterr().err
        assert len(names(open_gallery(out, colour_model()), "red", topk=99)) == 10
        paint(bad, (9, 9, 9))
        assert index(out, folder) == Counts(added=1, total=11)
        bad.write_bytes(b"broken again")
        assert index(out, folder) == Counts(removed=1, skipped=1, total=10)
        bad.unlink()
        assert index(out, folder) == Counts(total=10)
        assert len(rows_of(out)) == 10

    def test_a_picture_is_read_as_it_is_shown(self, tmp_path: Path) -> None:
        """Turned as EXIF says: the model sees a picture of 4 x 8 either way."""
        shapes = []
        model = colour_model()

        def transform(image: Image.Image) -> Tensor:
            shapes.append(image.size)
            return model.transform(image)

        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / "in").mkdir()
        Image.new("RGB", (8, 4), "red").save(tmp_path / "in" / "lying.jpg", exif=exif)
        index(tmp_path / "people.lance", tmp_path / "in", replace(model, transform=transform))
        assert shapes == [(4, 8)]

    def test_names_need_not_be_unicode(self, tmp_path: Path) -> None:
        strange = os.fsdecode(b"caf\xe9.png")
        paint(tmp_path / "in" / strange, (255, 0, 0))
        paint(tmp_path / "in" / "it's.png", (0, 0, 255))
        out = tmp_path / "people.lance"
        index(out, tmp_path / "in")
        assert index(out, tmp_path / "in") == Counts(total=2)
        assert names(open_gallery(out, colour_model()), "red") == [strange, "it's.png"]
        (tmp_path / "in" / "it's.png").unlink()
        assert index(out, tmp_path / "in") == Counts(removed=1, total=1)

    def test_shards_are_parts_of_one_gallery(self, tmp_path: Path, folder: Path) -> None:
        out = tmp_path / "people.lance"
        parts = [index(out, folder, shard=(number, 3)) for number in range(3)]
        assert sum(part.added for part in parts) == 10 and all(part.added < 10 for part in parts)
        (folder / "a" / "0.png").unlink()
        assert sum(index(out, folder, shard=(number, 3)).removed for number in range(3)) == 1
        assert index(out, folder) == Counts(total=9)

    def test_the_pictures_of_a_folder(self, tmp_path: Path) -> None:
        for name in ("b.PNG", "a/z.jpeg", "a/b/c.jfif", "a/notes.txt", ".hidden/x.jpg", "a/._y.jpg", "c.webp"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "circle").symlink_to(tmp_path)
        (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
        found = find_images(tmp_path)
        assert found == [str(tmp_path / name) for name in ("a/b/c.jfif", "a/z.jpeg", "b.PNG", "c.webp")]
        (tmp_path / "empty").mkdir()
        for missing, words in (("none", "does not exist"), ("empty", "There are no images under")):
            with pytest.raises(GalleryError, match=words):
                find_images(tmp_path / missing)


class TestScores:
    @pytest.mark.parametrize("half", [False, True])
    @pytest.mark.parametrize("reduce", ["dot", "topk_mean", "attr_avg"])
    def test_streamed_scores_are_those_of_the_ranking(
        self, tmp_path: Path, reduce: str, half: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To the last bit and with ties by position, however the rows are cut into blocks."""
        shape = (7,) if reduce == "dot" else (4, 7)
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(90, *shape, generator=generator)
        values[50:] = values[:40]  # equal pictures
        query = torch.randn(3, *((4, 7) if reduce == "attr_avg" else (7,)), generator=generator)
        model = replace(
            colour_model(),
            features=(Feature("colour", shape, reduce=reduce, k=3), Feature("more", (7,))),
            transform=lambda image: torch.tensor(image.getpixel((0, 0))[0]),
            encode_images=lambda pictures: {"colour": values[pictures], "more": values.flatten(1)[pictures, :7]},
            encode_queries=lambda queries: {"colour": query, "more": query.flatten(1)[:, :7]},
        )
        for number in range(90):
            paint(tmp_path / "in" / f"{number:02}.png", (number, 0, 0))
        index(tmp_path / "g.lance", tmp_path / "in", model, half=half)
        stored = values.half() if half else values
        expected = similarity(query, stored, reduce=reduce, k=3) + similarity(
            query.flatten(1)[:, :7], stored.flatten(1)[:, :7]
        )
        best = expected.sort(dim=1, descending=True, stable=True)
        monkeypatch.setattr("tbps_common.search.gallery._BLOCK_BYTES", 1)  # blocks of 48
        found = search(open_gallery(tmp_path / "g.lance", model), model, [Query("red")] * 3, topk=60)
        assert [[int(Path(hit.path).stem) for hit in hits] for hits in found] == best.indices[:, :60].tolist()
        assert torch.equal(torch.tensor([[hit.score for hit in hits] for hits in found]), best.values[:, :60])

    def test_the_judge_has_the_last_word(self, tmp_path: Path, folder: Path) -> None:
        index(tmp_path / "g.lance", folder)

        def judge(query: Query, pictures: Sequence[Image.Image], scores: Tensor, lowest: float) -> Tensor:
            assert query.text == "red" and len(pictures) == 3 and len(scores) == 4
            assert [picture.getpixel((0, 0))[0] for picture in pictures] == [255, 230, 205]
            assert lowest == pytest.approx(float(scores.min()) * 0 + 30 / (30**2 + 225**2) ** 0.5, abs=1e-3)
            return torch.tensor([1.0, 3.0, 2.0, 0.0])

        model = replace(colour_model(), judge=judge)
        gallery = open_gallery(tmp_path / "g.lance", model)
        hits = search(gallery, model, [Query("red")], topk=4, judge=3)[0]
        assert [os.path.basename(hit.path) for hit in hits] == ["1.png", "2.png", "0.png", "3.png"]
        with pytest.raises(InputError, match="no second stage"):
            search(gallery, colour_model(), [Query("red")], judge=3)

    def test_the_index_proposes_candidates(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tbps_common.search.ann.SMALLEST", 1)
        values = normalize(torch.randn(600, 3, generator=torch.Generator().manual_seed(0)), dim=1)
        model = replace(
            colour_model(),
            transform=lambda image: torch.tensor(sum(image.getpixel((0, 0)))),
            encode_images=lambda pictures: {"colour": values[pictures]},
            encode_queries=lambda queries: {"colour": values[[len(query.text) * 5 for query in queries]]},
        )
        for number in range(600):
            paint(tmp_path / "in" / f"{number:03}.png", (number // 3, (number + 1) // 3, (number + 2) // 3))
        out = tmp_path / "g.lance"
        index(out, tmp_path / "in", model)
        gallery = open_gallery(out, model)
        with pytest.raises(GalleryError, match="no index for --ann"):
            search(gallery, model, [Query("red")], ann=50)
        build_index(gallery)
        assert measure_recall(open_gallery(out, model), model, candidates=100).share > 0.9
        gallery = open_gallery(out, model)
        exact, found = (search(gallery, model, [Query("red")] * 2, topk=5, ann=ann) for ann in (0, 100))
        assert found == exact
        (tmp_path / "in" / "000.png").unlink()
        assert index(out, tmp_path / "in", model).total == 599
        assert search(open_gallery(out, model), model, [Query("red")], topk=5, ann=100) == [exact[0]]


class TestMetadata:
    @pytest.fixture
    def csv(self, tmp_path: Path, folder: Path) -> Path:
        lines = ["path,camera,time,height"]
        lines += [
            f"a/{number}.png,cam_{number % 2},2026-05-0{number + 1} 10:00,{1.5 + number / 10}" for number in range(5)
        ]
        lines += [f"{folder}/b/5.png,cam_1,2026-06-01T00:00:00,", "gone.png,cam_9,2026-06-01,2"]
        (tmp_path / "cameras.csv").write_text("\n".join(lines), encoding="utf-8")
        return tmp_path / "cameras.csv"

    def test_filters(self, tmp_path: Path, folder: Path, csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "g.lance"
        index(out, folder, metadata=read_metadata(str(csv)))
        assert "1 of 7 rows" in capsys.readouterr().err
        gallery = open_gallery(out, colour_model())
        assert {name: str(kind) for name, kind in gallery.columns.items()} == {
            "camera": "string", "time": "timestamp[us]", "height": "double",
        }  # fmt: skip
        for where, found in {
            "camera = 'cam_1'": "1 3 5",
            "camera = 'cam_0' and time > '2026-05-01'": "0 2 4",
            "time > '2026-05-02 09:00' AND time < timestamp '2026-05-04'": "1 2",
            "time BETWEEN '2026-05-02' AND '2026-05-04 12:00'": "1 2 3",
            "CAMERA IS NULL": "6 7 8 9",
            "height >= 1.8": "3 4",
            "camera = 'x' OR (height < 1.55)": "0",
        }.items():
            assert names(gallery, "red", where=where) == [f"{number}.png" for number in found.split()], where
        hit = search(gallery, colour_model(), [Query("red")], topk=1)[0][0]
        assert hit.data == {"camera": "cam_0", "time": datetime(2026, 5, 1, 10), "height": 1.5}

    def test_values_follow_the_file_for_all_models(self, tmp_path: Path, folder: Path, csv: Path) -> None:
        out, encoded = tmp_path / "g.lance", []
        index(out, folder)
        other = colour_model("b" * 64)
        index(out, folder, other)
        assert index(out, folder, colour_model(encoded=encoded), metadata=read_metadata(str(csv))) == Counts(total=10)
        csv.write_text(csv.read_text(encoding="utf-8").replace("a/0.png,cam_0", "a/0.png,cam_7"), encoding="utf-8")
        index(out, folder, other, metadata=read_metadata(str(csv)))
        assert encoded == []
        for model in (colour_model(), other):
            assert names(open_gallery(out, model), "red", where="camera = 'cam_7'") == ["0.png"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "must name the columns"),
            ("file,camera\na,b", "one of which is path"),
            ("path,camera\na/0.png", "line 2: 1 cells"),
            ("path,size\na/0.png,3", "cannot be called 'size'"),
            ("path,my camera\na/0.png,3", "cannot be called 'my camera'"),
            ("path,n\na/0.png,3\na/1.png,4\na/2.png,five", "line 4: 'five' is not a number"),
            (
                "path,t\na/0.png,2026-05-01\na/1.png,2026-05-02\na/2.png,2026-13-01",
                "line 4: '2026-13-01' is not a time",
            ),
            ("path,n:integer\na/0.png,x", "line 2: 'x' is not a integer"),
            ("path,n:colour\na/0.png,x", "'colour' of the column 'n' is not one of"),
            ("path,camera\nnowhere/0.png,3", "none of its paths"),
            ("path,colour\na/0.png,3", "'colour' is the gallery's own"),
            ('path,camera\n"a/0.png,3', "not a readable CSV"),
        ],
    )
    def test_bad_files_are_one_sentence(self, text: str, words: str, tmp_path: Path, folder: Path) -> None:
        (tmp_path / "m.csv").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=re.escape(words)):
            index(tmp_path / "g.lance", folder, metadata=read_metadata(str(tmp_path / "m.csv")))

    def test_a_column_keeps_its_type(self, tmp_path: Path, folder: Path) -> None:
        out = tmp_path / "g.lance"
        for text, words in (("1", None), ("cam_a", "holds string, but .* holds int64")):
            (tmp_path / "m.csv").write_text(f"path,camera\na/0.png,{text}", encoding="utf-8")
            if words is None:
                index(out, folder, metadata=read_metadata(str(tmp_path / "m.csv")))
                continue
            with pytest.raises(InputError, match=words):
                index(out, folder, metadata=read_metadata(str(tmp_path / "m.csv")))
        assert names(open_gallery(out, colour_model()), "red", where="camera = 1") == ["0.png"]

    @pytest.mark.parametrize(
        "where",
        [
            "", " ", "nope = 1", "camera", "camera = 'x'; DROP TABLE x", "1=1 -- x", "/* x */ 1=1", "camera = 'open",
            "camera = (SELECT 1)", "path IN (SELECT path FROM x)", "read_csv('/etc/passwd')", "1=1) OR (1=1",
            "camera = 'x' garbage", "camera = 'x' LIMIT 3", "COPY x TO '/tmp/y'", "time > 'yesterday'", "(" * 300,
            "NOT " * 2000 + "1=1", "1=1 OR " * 2000 + "1=1", "(" * 2000 + "1=1" + ")" * 2000, "height > 'tall'", "1",
        ],
    )  # fmt: skip
    def test_hostile_and_wrong_filters_are_one_sentence(
        self, where: str, tmp_path_factory: pytest.TempPathFactory, gallery_with_columns: Gallery
    ) -> None:
        with pytest.raises(InputError, match="--where") as caught:
            names(gallery_with_columns, "red", where=where)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="session")
def gallery_with_columns(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    root = tmp_path_factory.mktemp("columns")
    paint(root / "in" / "0.png", (255, 0, 0))
    (root / "m.csv").write_text("path,camera,time,height\n0.png,cam_a,2026-05-01,1.5", encoding="utf-8")
    index(root / "g.lance", root / "in", metadata=read_metadata(str(root / "m.csv")))
    return open_gallery(root / "g.lance", colour_model())


class TestDeletion:
    def test_a_persons_pictures_and_features_are_gone(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "g.lance"
        (folder / "broken.png").write_bytes(b"no picture")
        index(out, folder)
        index(out, folder, colour_model("b" * 64))
        secret = list_galleries(out)[0].table.search().where("key = 'b/7.png'").to_arrow()["colour"].to_pylist()[0]
        needle = np.array(secret, dtype=np.float32).tobytes()
        held = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
        assert needle in held and b"b/7.png" in held
        assert cli("--delete", "--out", out, "--path", folder / "b" / "7.png", "--files") == 0
        assert capsys.readouterr().out == "added 0, updated 0, removed 1, skipped 0, total 9\n"
        held = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
        assert needle not in held and b"b/7.png" not in held
        assert not (folder / "b" / "7.png").exists()
        assert cli("--delete", "--out", out, "--path", folder / "a") == 0
        assert cli("--delete", "--out", out, "--where", "path LIKE 'b/%' AND path < 'b/6'") == 0
        assert [gallery.stored_path(file) for gallery in list_galleries(out) for file in gallery.files()] == [
            "b/6.png", "b/8.png", "b/9.png"
        ] * 2  # fmt: skip
        assert index(out, folder).added == 6  # without --files the pictures come back

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([], "needs --path or --where"),
            (["--path", "nowhere.png"], "--path nowhere.png is not in"),
            (["--where", "nope = 1"], "No field named nope"),
        ],
    )
    def test_what_cannot_be_deleted(
        self, words: list[str], said: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "g.lance"
        index(out, folder)
        assert cli("--delete", "--out", out, *words) == 2
        assert said in capsys.readouterr().err
        assert len(rows_of(out)) == 10


class TestPlaces:
    def test_after_the_folder_has_moved(self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, encoded, moved = tmp_path / "g.lance", [], tmp_path / "elsewhere" / "pictures"
        for mark in "ab":
            index(out, folder, colour_model(mark * 64))
        moved.parent.mkdir()
        folder.rename(moved)
        assert cli("--out", out, "--root", tmp_path) == 2
        assert f"none of the pictures of {out} lies there" in capsys.readouterr().err
        assert cli("--out", out, "--root", moved) == 0
        assert capsys.readouterr().out == "added 0, updated 0, removed 0, skipped 0, total 10\n"
        for mark in "ab":
            model = colour_model(mark * 64, encoded)
            hits = search(open_gallery(out, model), model, [Query("red")], topk=1)[0]
            assert hits[0].path == str(moved / "a" / "0.png") and picture_of(hits[0]).size == (4, 8)
            assert index(out, moved, model) == Counts(total=10)
        assert encoded == []
        assert cli("--delete", "--out", out, "--path", moved / "a") == 0  # the tables are written anew
        assert open_gallery(out, colour_model()).root == str(moved)

    def test_a_gallery_may_have_an_address(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        address = f"file://{tmp_path}/g.lance"
        assert update_gallery(address, colour_model(), list_pictures(str(folder))).added == 10
        assert names(open_gallery(address, colour_model()), "red", topk=1) == ["0.png"]
        for place, words in {"memory://x": "would be forgotten", "hdfs://x/g.lance": "check the address"}.items():
            assert cli("--model", "clip:x", "--images", folder, "--out", place) == 2
            said = capsys.readouterr().err
            assert words in said and len(said.splitlines()) == 1, said


class TestFaults:
    def test_what_is_no_gallery(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_file({"features": torch.zeros(1, 2)}, tmp_path / "old.safetensors", {"format": "tbps-gallery/1"})
        (tmp_path / "some.txt").write_text("text", encoding="utf-8")
        (tmp_path / "empty").mkdir()
        (tmp_path / "half.lance" / "colour-1.lance").mkdir(parents=True)
        for name, words in {
            "old.safetensors": "is a gallery of the old format, which is a folder now: make it anew with tbps-index",
            "some.txt": "is a file, not a gallery",
            "gone.lance": "does not exist; build it with tbps-index",
            "empty": "holds no gallery",
            "half.lance": "holds no gallery",
        }.items():
            assert search_main(["--model", "clip:x", "--gallery", str(tmp_path / name), "--text", "x"]) == 2
            said = capsys.readouterr().err
            assert words in said and len(said.splitlines()) == 1, said
        assert not (tmp_path / "gone.lance").exists()

    def test_another_models_gallery(self, tmp_path: Path, folder: Path) -> None:
        index(tmp_path / "g.lance", folder)
        with pytest.raises(
            GalleryError, match=r"holds no features of colour:mean \(bbbbbbbb\), only those of .*aaaaaaaa"
        ):
            open_gallery(tmp_path / "g.lance", colour_model("b" * 64))

    def test_damaged_files_are_one_sentence(self, tmp_path: Path, folder: Path) -> None:
        out = tmp_path / "g.lance"
        index(out, folder)
        for file in out.rglob("data/*.lance"):
            file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(GalleryError, match="g.lance cannot be used") as caught:
            names(open_gallery(out, colour_model()), "red")
        assert "\n" not in str(caught.value)

    def test_features_that_are_not_finite_are_refused(self, tmp_path: Path, folder: Path) -> None:
        model = replace(colour_model(), encode_images=lambda pictures: {"colour": pictures * float("nan")})
        with pytest.raises(GalleryError, match=r"0.png holds NaN"):
            index(tmp_path / "g.lance", folder, model)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
    def test_a_read_only_gallery_can_be_searched(self, tmp_path: Path, folder: Path) -> None:
        out = tmp_path / "g.lance"
        index(out, folder)
        paint(folder / "new.png", (1, 2, 3))
        paths = [out, *out.rglob("*")]
        try:
            for path in paths:
                path.chmod(0o555 if path.is_dir() else 0o444)
            with pytest.raises(OSError, match="denied"):
                index(out, folder)
            assert len(names(open_gallery(out, colour_model()), "red")) == 10
        finally:
            for path in paths:
                path.chmod(0o755 if path.is_dir() else 0o644)

    def test_a_full_disk_loses_nothing(self, tmp_path: Path, folder: Path) -> None:
        out = tmp_path / "g.lance"
        index(out, folder)
        for number in range(500):
            paint(folder / "c" / f"{number}_{'x' * 60}.png", (1, 2, 3))
        limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        child = run_child(out, folder, limit + "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)", "0")
        assert child.wait() == 1
        assert "OSError: [Errno 27]" in child.communicate()[1]
        assert len(rows_of(out)) == 10
        assert index(out, folder) == Counts(added=500, total=510)

    @pytest.mark.slow
    def test_killed_at_any_moment_it_goes_on(self, tmp_path: Path) -> None:
        for number in range(60):
            paint(tmp_path / "in" / f"{number:02}.png", (number, 0, 0))
        out = tmp_path / "g.lance"
        held = 0
        for wait in (0.0, 0.11, 0.17):
            child = run_child(out, tmp_path / "in", "", "0.1")
            assert child.stdout is not None
            child.stdout.readline()  # the first batch is being encoded
            time.sleep(3 * wait)
            child.kill()
            child.communicate()
            if out.exists() and list_galleries(out, empty=True):
                keys = rows_of(out)
                assert len(keys) == len(set(keys)) >= held
                held = len(keys)
        assert 0 < held < 60
        assert index(out, tmp_path / "in") == Counts(added=60 - held, total=60)
        assert len(set(rows_of(out))) == len(rows_of(out)) == 60

    def test_two_writers_at_once(self, tmp_path: Path) -> None:
        for number in range(40):
            paint(tmp_path / "in" / f"{number:02}.png", (number, 0, 0))
        out = tmp_path / "g.lance"
        children = [run_child(out, tmp_path / "in", "", "0.05") for _ in range(2)]
        said = [child.communicate() for child in children]
        assert [child.returncode for child in children] == [0, 0], said
        assert sorted(rows_of(out)) == [f"{number:02}.png" for number in range(40)]


def run_child(out: Path, folder: Path, before: str, delay: str) -> "subprocess.Popen[str]":
    """Index in another process, four pictures a commit, each batch after a delay."""
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_search import colour_model, index, replace
import tbps_common.search.index as module
{before}
module._COMMIT_PICTURES = 4
model = colour_model()
def encode(pictures):
    print("batch", flush=True)
    time.sleep({delay})
    return model.encode_images(pictures)
print(index({str(out)!r}, {str(folder)!r}, replace(model, encode_images=encode)))
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestDetection:
    @pytest.fixture
    def frames(self, tmp_path: Path) -> Path:
        """A picture, a film of ten frames a second whose frame n has the colour (0, 20 n, 0), and a broken film."""
        av = pytest.importorskip("av")
        folder = tmp_path / "frames"
        paint(folder / "still.png", (255, 0, 0))
        with av.open(str(folder / "film.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
            for number in range(10):
                picture = Image.new("RGB", (64, 48), (0, 20 * number, 0))
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
        (folder / "broken.mp4").write_bytes(b"no film")
        return folder

    def test_persons_are_cut_out_of_pictures_and_films(
        self, tmp_path: Path, detector: Path, frames: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "g.lance"
        options = {"score": 0.0, "margin": 0.1, "smallest": 1, "fps": 5.0}
        found = open_detector(str(detector), device="cpu", **options)  # type: ignore[arg-type]
        pictures = list_pictures(str(frames), (".png", *VIDEOS))
        counts = update_gallery(str(out), colour_model(), pictures, detector=found)
        assert counts.skipped == 1 and counts.added == counts.total > 5
        assert "broken.mp4" in capsys.readouterr().err
        gallery = open_gallery(out, colour_model())
        hits = search(gallery, colour_model(), [Query("green")], topk=99)[0]
        assert {hit.frame for hit in hits if hit.path.endswith("film.mkv")} == {0, 2, 4, 6, 8}
        for hit in hits:
            assert hit.box is not None
            frame = frame_of(hit)
            assert 0 <= hit.box[0] < hit.box[2] <= frame.width and 0 <= hit.box[1] < hit.box[3] <= frame.height
            assert picture_of(hit).size == (hit.box[2] - hit.box[0], hit.box[3] - hit.box[1])
            if hit.frame is not None:
                assert frame.getpixel((0, 0)) == (0, 20 * hit.frame, 0)
        boxes, scores = found.find([read_image(frames / "still.png")])[0]
        assert sum(hit.frame is None for hit in hits) <= len(boxes) and bool(((0 <= scores) & (scores <= 1)).all())
        # Nothing changed, then a picture of which no person is high enough.
        again = update_gallery(str(out), colour_model(), pictures, detector=found)
        assert again == Counts(skipped=1, total=counts.total)
        os.utime(frames / "film.mkv", (5, 5))
        assert update_gallery(str(out), colour_model(), pictures, detector=found).updated == len(hits) - sum(
            hit.frame is None for hit in hits
        )
        strict = open_detector(str(detector), device="cpu", score=0.0, smallest=1000)
        assert update_gallery(str(tmp_path / "h.lance"), colour_model(), pictures, detector=strict) == Counts(skipped=3)
        with pytest.raises(GalleryError, match="was made with --detect"):
            update_gallery(str(out), colour_model(), pictures)

    def test_a_detector_of_torchvision_finds_the_persons_among_its_classes(self, tmp_path: Path) -> None:
        """Random weights, in which the class of persons has been made likely; a file as torchvision's own are."""
        models = pytest.importorskip("torchvision").models
        name, weights = "ssdlite320_mobilenet_v3_large", tmp_path / "weights.pth"
        torch.manual_seed(0)
        model = models.get_model(name, weights=None, weights_backbone=None)
        for layer in model.head.classification_head.module_list:
            with torch.no_grad():
                layer[-1].bias.view(-1, 91)[:, 1] += 5
                layer[-1].bias.view(-1, 91)[:, 2] += 6  # a bicycle, of which nothing is wanted
        torch.save(model.state_dict(), weights)
        picture = paint(tmp_path / "in" / "frame.png", (90, 90, 90))
        Image.new("RGB", (120, 80), (90, 90, 90)).save(picture)
        found = open_detector(f"{name}:{weights}", device="cpu", score=0.1, margin=0.0, smallest=1)
        with torch.no_grad():
            (everything,) = model.eval()([torch.full((3, 80, 120), 90 / 255)])
        right = everything["boxes"][(everything["labels"] == 1) & (everything["scores"] >= 0.1)]
        assert 0 < len(right) < len(everything["boxes"])
        assert [person.box for person in found.persons(str(picture))] == [
            tuple(round(side) for side in box) for box in right.tolist()
        ]

    def test_a_detector_that_cannot_be_used(self, tmp_path: Path) -> None:
        for name, words in {
            str(tmp_path): "is no detector of transformers",
            "fasterrcnn:w.pth": "torchvision has no detector 'fasterrcnn', only fasterrcnn_",
            "ssdlite320_mobilenet_v3_large:gone.pth": "gone.pth",
        }.items():
            with pytest.raises(InputError, match=words):
                open_detector(name, device="cpu")
