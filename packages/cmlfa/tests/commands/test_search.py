"""cmlfa-index and cmlfa-search over a folder of one's own."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from cmlfa import build_model, load_checkpoint
from cmlfa.cli import index_main, search_main
from cmlfa.config import load_train_configs
from cmlfa.datasets import SimpleTokenizer, build_transforms, tokenize
from tbps_common.search.gallery import list_galleries


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """A folder of five images with a sub-folder and something that is no image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    images = sorted((world / "CUHK-PEDES" / "imgs" / "cam_a").iterdir())
    for number, image in enumerate(images[:5]):
        shutil.copy(image, folder / ("more" if number > 2 else ".") / image.name)
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    return folder


@pytest.fixture
def parts_config(trained_run: Path, tmp_path: Path) -> Path:
    """The trained weights under `lfa_attention: parts`, where a feature depends on its own image alone."""
    run = tmp_path / "parts"
    run.mkdir()
    shutil.copy(trained_run / "best.pth", run)
    text = (trained_run / "configs.yaml").read_text(encoding="utf-8")
    text = text.replace("lfa_attention: batch", "lfa_attention: parts").replace(str(trained_run), str(run))
    (run / "configs.yaml").write_text(text, encoding="utf-8")
    return run / "configs.yaml"


def ranked(printed: str) -> list[tuple[str, float]]:
    return [(path, float(score)) for score, path in re.findall(r"^ *\d+  +(-?\d\.\d{4})  (.*)$", printed, re.MULTILINE)]


def test_ranking_equals_cosines_computed_one_by_one(
    parts_config: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery, picture = tmp_path / "people.lance", tmp_path / "hits.png"
    flags = ["--config_file", str(parts_config)]
    assert index_main([*flags, "--images", str(photos), "--out", str(gallery), "--batch_size", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "added 5, updated 0, removed 0, skipped 0, total 5"
    sentence = "A person in a red shirt and blue trousers."
    search = [*flags, "--index", str(gallery), "--text", sentence, "--output", str(picture), "--topk", "4"]
    assert search_main(search) == 0
    printed = capsys.readouterr().out
    assert "note:" not in printed

    args = load_train_configs(parts_config)
    model = build_model(args, 6)
    load_checkpoint(model, parts_config.parent / "best.pth")
    model.eval()
    transform = build_transforms(tuple(args.img_size), is_train=False)
    expected = {}
    with torch.no_grad():
        text = normalize(model.encode_text(tokenize(sentence, SimpleTokenizer(), args.text_length)[None]), dim=1)
        for path in photos.rglob("*.png"):
            with Image.open(path) as image:
                feature = normalize(model.encode_image(transform(image.convert("RGB"))[None]), dim=1)
            expected[str(path)] = float((text * feature).sum())
    best = sorted(expected.items(), key=lambda entry: -entry[1])[:4]
    found = ranked(printed)
    assert [path for path, _ in found] == [path for path, _ in best]
    assert [score for _, score in found] == pytest.approx([score for _, score in best], abs=1e-4)
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height


def test_index_is_completed_not_repeated(
    parts_config: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = tmp_path / "people.lance"
    flags = ["--config_file", str(parts_config), "--images", str(photos), "--out", str(gallery)]
    assert index_main(flags) == 0
    shutil.copy(photos / "more" / sorted((photos / "more").iterdir())[0].name, photos / "z_new.png")
    capsys.readouterr()
    assert index_main(flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "added 1, updated 0, removed 0, skipped 0, total 6"
    before = list_galleries(gallery)[0].table.search().to_arrow()
    assert index_main(flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "added 0, updated 0, removed 0, skipped 0, total 6"
    assert list_galleries(gallery)[0].table.search().to_arrow() == before


def test_batch_dependent_model_says_so_in_one_line(
    trained_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = tmp_path / "people.lance"
    flags = ["--config_file", str(trained_run / "configs.yaml")]
    assert index_main([*flags, "--images", str(photos), "--out", str(gallery)]) == 0
    assert capsys.readouterr().out.count("depends on the batch") == 1
    search = [*flags, "--index", str(gallery), "--text", "red", "--output", str(tmp_path / "hits.png")]
    assert search_main(search) == 0
    assert capsys.readouterr().out.count("depends on the batch") == 1


def test_index_of_another_model_is_refused(
    trained_run: Path, parts_config: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = tmp_path / "people.lance"
    assert index_main(["--config_file", str(parts_config), "--images", str(photos), "--out", str(gallery)]) == 0
    other = ["--config_file", str(trained_run / "configs.yaml")]
    assert search_main([*other, "--index", str(gallery), "--text", "red"]) == 2
    assert "holds no features of" in capsys.readouterr().err
    # Both may index into one gallery.
    assert index_main([*other, "--images", str(photos), "--out", str(gallery)]) == 0
    assert search_main([*other, "--index", str(gallery), "--text", "red", "--output", str(tmp_path / "hits.png")]) == 0


def test_bad_input_is_told_in_a_sentence(
    parts_config: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config_file", str(parts_config)]
    assert index_main([*flags, "--images", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    gallery = tmp_path / "people.lance"
    assert search_main([*flags, "--index", str(gallery), "--text", "red"]) == 2
    assert str(gallery) in capsys.readouterr().err
    assert search_main([*flags, "--index", str(gallery), "--text", "  "]) == 2
    assert "--text" in capsys.readouterr().err


def test_a_picture_stored_lying_is_read_as_it_is_shown(parts_config: Path, photos: Path, tmp_path: Path) -> None:
    upright = sorted(photos.glob("*.png"))[0]
    folder = tmp_path / "phone"
    folder.mkdir()
    with Image.open(upright) as image:
        image.save(folder / "upright.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by a quarter
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "lying.png", exif=exif)
    gallery = tmp_path / "people.lance"
    assert index_main(["--config_file", str(parts_config), "--images", str(folder), "--out", str(gallery)]) == 0
    lying, straight = map(torch.tensor, list_galleries(gallery)[0].table.search().to_arrow()["feature"].to_pylist())
    torch.testing.assert_close(lying, straight)
