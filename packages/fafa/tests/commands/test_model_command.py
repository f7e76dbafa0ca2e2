"""`tbps-model` on the files of FAFA."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fafa.checkpoint import official_state_dict
from fafa.model import Blip2FAFACPR
from tbps_common.cli import model_main
from tbps_world.tiny.fafa import TINY_MODEL


@pytest.mark.parametrize("vit", ["eva_clip_g", "clip_L"])
def test_a_checkpoint_blip2_and_the_bare_tower_are_recognised(vit: str, toy: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**TINY_MODEL, "tokenizer": str(toy / "vocab.txt"), "vit_model": vit}
    state = official_state_dict(Blip2FAFACPR.from_config(settings))
    prefix = "visual_encoder."
    tower = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    # LAVIS's files of the bare tower hold one block more.
    last = {name.replace("locks.1.", "locks.2."): tensor for name, tensor in tower.items() if "locks.1." in name}
    files = {
        "checkpoint of FAFA": {"model": state, "epoch": 3},
        "BLIP-2": {name: tensor for name, tensor in state.items() if not name.startswith("mlm_predictor.")},
        "EVA-CLIP" if vit == "eva_clip_g" else "CLIP ViT-L": tower | last,
    }
    for number, (layout, content) in enumerate(files.items()):
        torch.save(content, tmp_path / f"{number}.pth")
        assert model_main(["inspect", str(tmp_path / f"{number}.pth"), "--json", str(tmp_path / "out.json")]) == 0
        found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert found["paper"] == "FAFA" and found["layout"].startswith(layout) and found["fits"] is True
        assert f"{3 if number == 2 else 2} blocks" in found["sizes"]["image tower"]
