"""visualize.py: the row of pictures, and what is printed beside it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmlfa.cli import visualize_main
from cmlfa.visualize import draw_row


def test_last_query_is_taken_when_the_released_one_does_not_exist(
    trained_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "ui.png"
    flags = ["--config_file", str(trained_run / "configs.yaml"), "--output", str(picture), "--topk", "3"]
    assert visualize_main(flags) == 0
    printed = capsys.readouterr().out
    records = json.loads((world / "CUHK-PEDES" / "reid_raw.json").read_text(encoding="utf-8"))
    last = records[-1]
    assert f"query: 15, id {last['id']}" in printed
    assert f"caption: {last['captions'][1]}" in printed
    assert f"ground truth: {world / 'CUHK-PEDES' / 'imgs' / last['file_path']}" in printed
    ids = re.search(r"result ids: (.*)", printed)
    assert ids is not None
    assert len(ids[1].split()) == 3
    with Image.open(picture) as drawn:
        assert drawn.width / drawn.height == pytest.approx(4 * 1.1 / 2.2, rel=0.01)
        assert drawn.info["dpi"][0] == pytest.approx(300, abs=1)


def test_own_sentence_has_no_ground_truth(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "own.png"
    flags = ["--config_file", str(trained_run / "configs.yaml"), "--output", str(picture)]
    assert visualize_main([*flags, "--caption", "a red shirt"]) == 0
    printed = capsys.readouterr().out
    assert "ground truth" not in printed
    assert "caption: a red shirt" in printed
    with Image.open(picture) as drawn:  # the gallery has eight images
        assert drawn.width / drawn.height == pytest.approx(8 * 1.1 / 2.2, rel=0.01)


def test_frames_tell_right_from_wrong(world: Path, tmp_path: Path) -> None:
    images = sorted((world / "CUHK-PEDES" / "imgs" / "cam_a").iterdir())[:3]
    draw_row(tmp_path / "row.png", str(images[0]), [(str(images[1]), True), (str(images[2]), False)])
    with Image.open(tmp_path / "row.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    lawngreen = (abs(pixels - np.array([124, 252, 0])).sum(axis=2) < 10).sum(axis=0)
    red = (abs(pixels - np.array([255, 0, 0])).sum(axis=2) < 10).sum(axis=0)
    third = pixels.shape[1] // 3
    assert not lawngreen[:third].any()
    assert not red[:third].any()
    assert lawngreen[third : 2 * third].max() > 300
    assert red[2 * third :].max() > 300


def test_unusable_flags_are_told_in_a_sentence(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config_file", str(trained_run / "configs.yaml")]
    assert visualize_main([*flags, "--output", str(tmp_path / "ui.xyz")]) == 2
    assert "ui.xyz" in capsys.readouterr().err
    assert visualize_main([*flags, "--root_dir", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        visualize_main([*flags, "--query_idx", "1", "--caption", "both"])
    assert ended.value.code == 2
