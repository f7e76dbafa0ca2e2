"""`tbps-model` on the files of DiaNA."""

import json
import shutil
from pathlib import Path

import pytest

from diana.model import DiaNAConfig, DiaNAModel
from tbps_common.cli import model_main


@pytest.mark.parametrize(
    ("name", "layout"), [("swinv2-tiny", "SwinV2"), ("llama-tiny", "Llama"), ("model", "checkpoint of DiaNA")]
)
@pytest.mark.parametrize("config", [True, False])
def test_checkpoints_and_backbones_are_recognised(
    name: str, layout: str, config: bool, tiny: Path, tmp_path: Path
) -> None:
    if name == "model":
        made = DiaNAConfig.from_file(tiny / "configs" / "config.json")
        made.refiner_config["enable_refiner"] = True
        made.use_llama_lora = 2
        DiaNAModel(made).save_pretrained(tmp_path / name)
    else:
        shutil.copytree(tiny / name, tmp_path / name)
    if not config:
        (tmp_path / name / "config.json").unlink()
    assert model_main(["inspect", str(tmp_path / name), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["paper"] == "DiaNA" and found["layout"].startswith(layout) and found["fits"] is True
