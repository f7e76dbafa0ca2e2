"""mra-index and mra-search over a folder of one's own."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mra import build_tokenizer, build_transforms, encode_images, encode_texts, itm_rerank, tokenize
from mra.cli import index_main, search_main

SENTENCE = "bab doc gut"


def ranked(printed: str) -> list[tuple[str, float]]:
    return [(path, float(score)) for score, path in re.findall(r"^ *\d+  +(-?\d\.\d{4})  (.*)$", printed, re.MULTILINE)]


@pytest.fixture
def photos(split: Path, tmp_path: Path) -> Path:
    """A folder of seven images with a sub-folder and something that is no image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(7):
        shutil.copy(split / "images" / f"{number}.png", folder / ("more" if number > 4 else "."))
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    return folder


@pytest.fixture
def trained(
    model: Callable[..., Any], config: Callable[..., Any], split: Path, tmp_path: Path
) -> tuple[Any, list[str]]:
    """A model, and the flags that name its checkpoint (which holds its configuration)."""
    net = model("cuhk")
    settings = config("cuhk", text_encoder=str(split / "bert"))
    torch.save({"model": net.state_dict(), "config": settings}, tmp_path / "model.pth")
    return net, ["--checkpoint", str(tmp_path / "model.pth"), "--device", "cpu"]


@torch.no_grad()
def by_hand(
    net: Any, config: dict[str, Any], split: Path, paths: list[Path], k: int, score_world: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities and final scores `[1, G]` of the images."""
    transform = build_transforms(config)["test"]
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    (embeds, feats), (hembeds, hfeats) = encode_images(net, images), encode_images(net, images.flip(3))
    ids, atts = tokenize(build_tokenizer(split / "bert"), [SENTENCE], config["max_tokens"])
    text, text_feats = encode_texts(net, ids, atts)
    sims = text_feats @ ((feats + hfeats) / 2).t()
    return sims, itm_rerank(net, sims, embeds, text, atts, k, hembeds, score_world)


def test_ranking_equals_scores_computed_by_hand(
    trained: tuple[Any, list[str]], config: Callable[..., Any], photos: Path, split: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    net, flags = trained
    gallery, picture = str(tmp_path / "people.lance"), tmp_path / "hits.png"
    assert (
        index_main([*flags, "--images", str(photos), "--out", gallery, "--batch_size", "3", "--num_workers", "2"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == "added 7, updated 0, removed 0, skipped 0, total 7"
    paths = sorted(photos.rglob("*.png"))
    sims, scores = by_hand(net, config("cuhk"), split, paths, 4)
    for more, expected in ([], sims), (["--rerank", "4"], scores):
        search = ["--index", gallery, "--text", SENTENCE, "--output", str(picture), "--topk", "5", *more]
        assert search_main([*flags, *search]) == 0
        found = ranked(capsys.readouterr().out)
        values, order = expected[0].sort(descending=True, stable=True)
        assert [path for path, _ in found] == [str(paths[place]) for place in order[:5]]
        assert [score for _, score in found] == pytest.approx(values[:5].tolist(), abs=1e-3)
        with Image.open(picture) as drawn:
            assert drawn.size[0] > 500
        picture.unlink()

    # The weight that a configuration has for the similarity; score_world 1 is the paper's formula.
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    content["config"]["score_world"] = 16
    torch.save(content, tmp_path / "model.pth")
    search = ["--index", gallery, "--text", SENTENCE, "--output", str(picture), "--topk", "7", "--rerank", "7"]
    assert search_main([*flags, *search]) == 0
    weighted = by_hand(net, config("cuhk"), split, paths, 7, score_world=16)[1][0]
    values, order = weighted.sort(descending=True, stable=True)
    found = ranked(capsys.readouterr().out)
    assert [path for path, _ in found] == [str(paths[place]) for place in order]
    assert [score for _, score in found] == pytest.approx(values.tolist(), abs=1e-3)

    # New images are added to the gallery, and another model's gallery is refused.
    shutil.copy(split / "images" / "20.png", photos)
    assert index_main([*flags, "--images", str(photos), "--out", gallery, "--num_workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "added 1, updated 0, removed 0, skipped 0, total 8"
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    content["model"]["temp"] = torch.tensor(0.5)
    torch.save(content, tmp_path / "model.pth")
    assert search_main([*flags, "--index", gallery, "--text", SENTENCE]) == 2
    assert "holds no features of" in capsys.readouterr().err


def test_a_sentence_alone_or_without_known_words(
    trained: tuple[Any, list[str]], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, flags = trained
    gallery = str(tmp_path / "people.lance")
    assert index_main([*flags, "--images", str(photos), "--out", gallery, "--num_workers", "0"]) == 0
    for text in ("x", "\u4eba \U0001f9e5 !?", "word " * 2000):
        search = [
            "--index",
            gallery,
            "--text",
            text,
            "--topk",
            "99",
            "--rerank",
            "99",
            "--output",
            str(tmp_path / "a.png"),
        ]
        assert search_main([*flags, *search]) == 0
        assert len(ranked(capsys.readouterr().out)) == 7


def test_bad_input_is_one_line(
    trained: tuple[Any, list[str]], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, flags = trained
    checkpoint = flags[:2]
    (tmp_path / "cut.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:5000])
    torch.save(torch.load(tmp_path / "model.pth", weights_only=True)["model"], tmp_path / "bare.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no index", encoding="utf-8")
    images = ["--images", str(photos)]
    out = ["--out", str(tmp_path / "out.lance"), "--num_workers", "0"]
    query = ["--text", "a man", "--index"]
    cases = [
        (index_main, ["--checkpoint", "gone.pth", *images, *out], "checkpoint gone.pth"),
        (index_main, ["--checkpoint", str(tmp_path / "cut.pth"), *images, *out], "cut.pth"),
        (index_main, ["--checkpoint", str(tmp_path / "bare.pth"), *images, *out], "holds no configuration"),
        (index_main, [*checkpoint, "--images", str(tmp_path / "gone"), *out], "gone"),
        (index_main, [*checkpoint, "--images", str(tmp_path / "empty"), *out], "empty"),
        (index_main, [*checkpoint, *images, *out, "--config", "configs/none.yaml"], "none.yaml"),
        (index_main, [*checkpoint, *images, *out, "--config", "configs/rstp.yaml"], "vocab.txt"),
        (index_main, [*checkpoint, *images, *out, "--text_encoder", str(tmp_path)], "vocab.txt"),
        (search_main, [*checkpoint, *query, str(tmp_path / "gone.safetensors")], "gone.safetensors"),
        (search_main, [*checkpoint, *query, str(tmp_path / "text.safetensors")], "text.safetensors"),
        (search_main, [*checkpoint, "--text", "  ", "--index", "x"], "--text is empty"),
    ]
    for command, arguments, words in cases:
        assert command(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "Traceback" not in error, (arguments, error)
    assert not (tmp_path / "out.lance").exists()
