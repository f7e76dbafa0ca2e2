"""The gallery index: one file, memory-mapped, appendable, tied to its model."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tbps_common.errors import GalleryError
from tbps_common.ranking import similarity
from tbps_common.search.old_gallery import GalleryIndex, complete_index, find_images

MODEL, OTHER = "1" * 64, "2" * 64


def batches(features: Tensor, size: int = 3, prefix: str = "img") -> Iterator[tuple[list[str], Tensor]]:
    for start in range(0, len(features), size):
        part = features[start : start + size]
        yield [f"{prefix}/{number:04}.jpg" for number in range(start, start + len(part))], part


def build(path: Path, features: Tensor, **options: Any) -> GalleryIndex:
    return GalleryIndex.build(path, batches(features), **{"fingerprint": MODEL, "package": "cmlfa", **options})


class TestFile:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("shape", [(10, 5), (7, 3, 5), (1, 1)])
    def test_what_is_built_is_read_back(self, tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        features = torch.randn(shape).to(dtype)
        options = {"reduce": "dot" if len(shape) == 2 else "topk_mean", "k": 2, "root": "my images"}
        built = build(tmp_path / "a.safetensors", features, **options)
        opened = GalleryIndex.open(tmp_path / "a.safetensors", fingerprint=MODEL)
        for index in (built, opened):
            assert index.features.dtype == dtype and torch.equal(index.features, features)
            assert index.paths == [f"img/{number:04}.jpg" for number in range(len(features))]
            assert (index.package, index.fingerprint, index.k, index.root) == ("cmlfa", MODEL, 2, "my images")
            assert index.reduce == options["reduce"] and len(index) == len(features) and index.skipped == 0
            assert index.image_path(0) == os.path.join("my images", "img/0000.jpg")
        assert os.listdir(tmp_path) == ["a.safetensors"]

    def test_other_floating_types_become_float32(self, tmp_path: Path) -> None:
        for dtype in (torch.float64, torch.bfloat16):
            features = torch.randn(4, 3).to(dtype)
            index = build(tmp_path / "a.safetensors", features)
            assert index.features.dtype == torch.float32 and torch.equal(index.features, features.float())

    def test_the_file_is_plain_safetensors_with_aligned_tensors(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        build(path, torch.randn(3, 1).half())
        with safe_open(path, framework="np") as content:
            assert set(content.keys()) == {"features", "path_bytes", "path_ends"}
            assert content.get_tensor("path_ends").tolist() == [12, 24, 36]
            assert content.get_tensor("path_bytes").tobytes().startswith(b"img/0000.jpgimg/0001.jpg")
        size = path.stat().st_size
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 8 == 0 and size % 8 == 0

    @settings(max_examples=30, deadline=None)
    @given(
        names=st.lists(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=12
        )
    )
    def test_any_path_survives(self, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("gallery") / "a.safetensors"
        index = GalleryIndex.build(path, [(names, torch.ones(len(names), 2))], fingerprint=MODEL, package="p")
        assert index.paths == list(dict.fromkeys(names))
        assert index.skipped == len(names) - len(set(names))

    def test_a_file_name_that_is_no_utf8(self, tmp_path: Path) -> None:
        name = os.fsdecode(b"caf\xe9.jpg")
        index = GalleryIndex.build(
            tmp_path / "a.safetensors", [([name], torch.ones(1, 2))], fingerprint=MODEL, package="p"
        )
        assert os.fsencode(index.paths[0]) == b"caf\xe9.jpg"

    def test_features_are_not_read_before_they_are_used(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        GalleryIndex.build(
            path,
            (([f"{n}-{m}" for m in range(1000)], torch.full((1000, 1024), float(n))) for n in range(40)),
            fingerprint=MODEL,
            package="p",
        )
        code = (
            "import sys; from tbps_common.search.old_gallery import GalleryIndex\n"
            "def resident(): return int(open('/proc/self/statm', encoding='ascii').read().split()[1]) * 4096\n"
            "before = resident(); index = GalleryIndex.open(sys.argv[1])\n"
            "row = index.features[39_999].clone(); print(resident() - before, float(row.mean()))\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        grown, mean = done.stdout.split()
        assert float(mean) == 39.0
        assert int(grown) < 40e6 < path.stat().st_size  # of 164 MB


class TestAppend:
    def test_images_are_added_and_known_ones_skipped(self, tmp_path: Path) -> None:
        path, features = tmp_path / "a.safetensors", torch.randn(9, 4)
        index = build(path, features[:5])
        old = index.features
        index.append(batches(features, size=4))
        assert index.skipped == 5
        for now in (index, GalleryIndex.open(path, fingerprint=MODEL)):
            assert torch.equal(now.features, features) and len(now) == 9
            assert now.paths == [f"img/{number:04}.jpg" for number in range(9)]
        assert torch.equal(old, features[:5])
        assert os.listdir(tmp_path) == ["a.safetensors"]

    def test_piece_by_piece_equals_at_once(self, tmp_path: Path) -> None:
        features = torch.randn(11, 2, 3).half()
        whole = build(tmp_path / "a.safetensors", features, reduce="max")
        pieces = GalleryIndex.build(
            tmp_path / "b.safetensors", list(batches(features))[:1], fingerprint=MODEL, package="cmlfa", reduce="max"
        )
        for batch in list(batches(features))[1:]:
            pieces.append([batch])
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
        assert whole.paths == pieces.paths

    def test_features_of_another_shape_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        index = build(path, torch.ones(4, 3))
        before = path.read_bytes()
        with pytest.raises(GalleryError, match=r"\[5\].*\[3\]"):
            index.append([(["new.jpg"], torch.ones(1, 5))])
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]

    def test_a_full_disk_keeps_the_index(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        index = build(path, torch.ones(4, 3))
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, hard))
        try:
            with pytest.raises(OSError):
                index.append([([str(n) for n in range(10_000)], torch.ones(10_000, 3))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


class TestRefusals:
    def test_another_models_query(self, tmp_path: Path) -> None:
        build(tmp_path / "a.safetensors", torch.ones(2, 3))
        with pytest.raises(GalleryError, match="111111111111.*222222222222"):
            GalleryIndex.open(tmp_path / "a.safetensors", fingerprint=OTHER)

    def test_no_image_leaves_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(GalleryError, match="at least one image"):
            GalleryIndex.build(tmp_path / "a.safetensors", [], fingerprint=MODEL, package="p")
        assert os.listdir(tmp_path) == []

    def test_a_damaged_feature_names_its_image(self, tmp_path: Path) -> None:
        features = torch.ones(5, 2, 3)
        features[3, 1, 2] = float("nan")
        with pytest.raises(GalleryError, match="img/0003.jpg"):
            build(tmp_path / "a.safetensors", features)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("paths", "features"),
        [(["a", "b"], torch.ones(1, 2)), (["a"], torch.ones(1)), (["a"], torch.ones(1, 2, dtype=torch.int64))],
    )
    def test_batches_that_do_not_fit(self, tmp_path: Path, paths: list[str], features: Tensor) -> None:
        with pytest.raises(GalleryError):
            GalleryIndex.build(tmp_path / "a.safetensors", [(paths, features)], fingerprint=MODEL, package="p")

    @pytest.mark.parametrize("part", range(20))
    def test_cut_off(self, tmp_path: Path, part: int) -> None:
        path = tmp_path / "a.safetensors"
        build(path, torch.ones(20, 3))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * part // 20])
        with pytest.raises(GalleryError, match=r"a\.safetensors"):
            GalleryIndex.open(path)

    def test_every_flipped_bit_of_the_header_is_refused_or_harmless(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        build(path, torch.ones(20, 3))
        content = bytearray(path.read_bytes())
        for position in range(8 + int.from_bytes(content[:8], "little")):
            content[position] ^= 1 << (position % 7)
            path.write_bytes(content)
            try:
                index = GalleryIndex.open(path)
            except GalleryError:
                pass
            else:
                assert len(index) == 20 and torch.isfinite(index.features.float()).all()
            content[position] ^= 1 << (position % 7)

    @pytest.mark.parametrize("ends", [[-1, 5], [5, 3], [3, 10**9]])
    def test_forged_path_ends(self, tmp_path: Path, ends: list[int]) -> None:
        path = tmp_path / "a.safetensors"
        tensors = {
            "features": torch.ones(2, 3),
            "path_bytes": torch.zeros(8, dtype=torch.uint8),
            "path_ends": torch.tensor(ends),
        }
        metadata = {"format": "tbps-gallery/1", "package": "p", "fingerprint": MODEL, "reduce": "dot", "k": "6"}
        save_file(tensors, path, metadata)
        with pytest.raises(GalleryError, match="damaged list of paths"):
            GalleryIndex.open(path)

    def test_foreign_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file({"features": torch.ones(2, 3)}, path)
        with pytest.raises(GalleryError, match="not a gallery index"):
            GalleryIndex.open(path)
        path.write_bytes(b"hello, this is no index at all")
        with pytest.raises(GalleryError, match="not a gallery index"):
            GalleryIndex.open(path)
        for absent in (tmp_path / "none", tmp_path):
            with pytest.raises(GalleryError, match="does not exist"):
                GalleryIndex.open(absent)


class TestSearch:
    @pytest.mark.parametrize(
        ("gallery", "query", "reduce"),
        [((40, 6), (5, 6), "dot"), ((40, 9, 6), (5, 6), "topk_mean"), ((40, 3, 6), (5, 3, 6), "attr_avg")],
    )
    def test_the_best_images_come_first(
        self, tmp_path: Path, gallery: tuple[int, ...], query: tuple[int, ...], reduce: str
    ) -> None:
        features, queries = torch.randn(gallery), torch.randn(query)
        index = build(tmp_path / "a.safetensors", features, reduce=reduce, k=4)
        indices, scores = index.search(queries, topk=7)
        full = similarity(queries, features, reduce=reduce, k=4)
        expected = torch.sort(full, dim=1, descending=True, stable=True)
        assert indices.dtype == torch.int64
        assert torch.equal(indices, expected.indices[:, :7])
        torch.testing.assert_close(scores, expected.values[:, :7])

    def test_equal_scores_keep_the_order_of_the_index(self, tmp_path: Path) -> None:
        features = torch.tensor(np.random.default_rng(0).integers(0, 3, (200, 1)), dtype=torch.float32)
        index = build(tmp_path / "a.safetensors", features)
        indices, _ = index.search(torch.ones(1, 1), topk=150)
        expected = sorted(range(200), key=lambda position: -float(features[position]))[:150]
        assert indices[0].tolist() == expected

    def test_many_queries_are_scored_in_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        features, queries = torch.randn(30, 4), torch.randn(11, 4)
        index = build(tmp_path / "a.safetensors", features)
        at_once = index.search(queries, topk=5)
        monkeypatch.setattr("tbps_common.search.old_gallery._SCORE_BYTES", 30 * 4 * 2)
        in_blocks = index.search(queries, topk=5)
        assert torch.equal(at_once[0], in_blocks[0])
        torch.testing.assert_close(at_once[1], in_blocks[1])

    def test_fewer_images_than_asked_for(self, tmp_path: Path) -> None:
        indices, scores = build(tmp_path / "a.safetensors", torch.randn(3, 4)).search(torch.randn(2, 4), topk=10)
        assert indices.shape == scores.shape == (2, 3)

    @pytest.mark.parametrize("query", [torch.ones(1, 5), torch.full((1, 4), float("nan")), torch.ones(4)])
    def test_a_query_that_does_not_fit(self, tmp_path: Path, query: Tensor) -> None:
        index = build(tmp_path / "a.safetensors", torch.randn(3, 4))
        with pytest.raises(ValueError):
            index.search(query)


class TestFindImages:
    def test_nested_sorted_by_suffix_without_hidden_ones(self, tmp_path: Path) -> None:
        for name in ("b.PNG", "a/z.jpeg", "a/b/c.jpg", "a/notes.txt", ".hidden/x.jpg", "a/._y.jpg", "c.webp"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        found = find_images(tmp_path)
        assert found == [str(tmp_path / name) for name in ("a/b/c.jpg", "a/z.jpeg", "b.PNG", "c.webp")]
        assert find_images(str(tmp_path)) == found

    def test_links_are_followed_but_not_in_circles(self, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "a.jpg").touch()
        root = tmp_path / "root"
        root.mkdir()
        (root / "b.jpg").touch()
        (root / "linked").symlink_to(tmp_path / "outside")
        (root / "circle").symlink_to(root)
        (tmp_path / "outside" / "up").symlink_to(root)
        (root / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
        assert find_images(root) == [str(root / "b.jpg"), str(root / "linked" / "a.jpg")]

    def test_nothing_found(self, tmp_path: Path) -> None:
        with pytest.raises(GalleryError, match="There are no images under"):
            find_images(tmp_path)
        with pytest.raises(GalleryError, match="does not exist"):
            find_images(tmp_path / "none")


def test_complete_index_adds_only_what_is_new(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def encode(paths: list[str]) -> Iterator[tuple[list[str], torch.Tensor]]:
        asked.append(paths)
        yield paths, torch.tensor([[float(path), 1.0] for path in paths])

    file = tmp_path / "gallery.safetensors"
    rule = {"fingerprint": "f", "package": "p", "reduce": "dot", "k": 6}
    assert complete_index(file, ["1", "2"], encode, **rule).endswith("2 images")
    assert "1 images added, 1 there already, 3 in all" in complete_index(file, ["2", "3"], encode, **rule)
    complete_index(file, ["1", "2", "3"], encode, **rule)
    assert asked == [["1", "2"], ["3"]]
    assert GalleryIndex.open(file).features[:, 0].tolist() == [1.0, 2.0, 3.0]
    for changed in ({"fingerprint": "g"}, {"reduce": "topk_mean"}):
        with pytest.raises(GalleryError, match="build"):
            complete_index(file, ["4"], encode, **(rule | changed))
    assert len(GalleryIndex.open(file)) == 3
