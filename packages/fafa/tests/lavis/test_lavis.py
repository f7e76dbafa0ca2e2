"""LAVIS 1.0.2 as a second reference, in an environment of its own that `uv` makes (6 GB, shared with uv's cache)."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fafa import Blip2FAFACPR
from fafa.checkpoint import official_state_dict
from fafa.processors import BlipCaptionProcessor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("uv") is None, reason="uv makes the environment of LAVIS, and it is not installed"),
]

PACKAGE = Path(__file__).resolve().parents[2]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the man woman with red blue coat shoes , ' - ##s walk and please".split()
CAPTIONS = ["a man with a red coat", "the woman's blue shoes, please", "walks"]


@pytest.fixture(scope="module")
def lavis_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment with `packages/fafa/lavis`."""
    folder = tmp_path_factory.mktemp("lavis")
    python = folder / "venv" / "bin" / "python"
    plain = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    for command in (
        ["uv", "venv", "--quiet", "--python", "3.11", str(folder / "venv")],
        # Reinstalled, because uv keeps what it built of a folder even when the sources in it have changed.
        ["uv", "pip", "install", "--quiet", "--python", str(python), str(PACKAGE / "lavis")]
        + ["--reinstall-package", "fafa-lavis", "--reinstall-package", "fafa", "--reinstall-package", "tbps-common"],
    ):
        done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    return python


def mapping(kind: str) -> dict[str, Any]:
    width = {"eva_clip_g": 24, "clip_L": 64}[kind]
    return {
        "load_pretrained": False,
        "vit_model": kind,
        "image_size": 28,
        "vit_width": width,
        "vit_depth": 2,
        "vit_heads": 3 if kind == "eva_clip_g" else 1,
        "num_query_token": 5,
        "embed_dim": 16,
        "max_txt_len": 12,
        "mfr_hidden_dim": 20,
        "fda_k": 3,
        "tokenizer": "vocab.txt",
        "qformer": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    }


def randomised(model: Blip2FAFACPR) -> Blip2FAFACPR:
    """Biases and norms away from 0 and 1, where a mistake in them would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_our_towers_agree_with_lavis(lavis_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS), encoding="utf-8")
    torch.manual_seed(0)
    draws = {"dsu_eps_beta": torch.randn(5, 32), "dsu_eps_gamma": torch.randn(5, 32)}
    draws |= {f"mfr_mask_{side}": (torch.rand(3, 32) < 0.3).float() for side in "AB"}
    work = {"image": torch.randn(3, 3, 28, 28), "target": torch.randn(3, 3, 28, 28), "ids": torch.tensor([4, 4, 9])}
    save_file({**work, **{f"draws.{name}": value for name, value in draws.items()}}, tmp_path / "work.safetensors")
    models = {}
    for kind in ("eva_clip_g", "clip_L"):
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump({"model": mapping(kind)}), encoding="utf-8")
        models[kind] = randomised(Blip2FAFACPR.from_pretrained(str(path))).eval()
        state = {name: value.clone().contiguous() for name, value in official_state_dict(models[kind]).items()}
        save_file(state, tmp_path / f"{kind}.safetensors")

    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(
        [str(lavis_python), "-W", "ignore", str(Path(__file__).with_name("inside.py")), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]

    for kind, model in models.items():
        found = load_file(tmp_path / f"{kind}.found.safetensors")
        features, embeds = model.extract_target_features(work["image"])
        samples = {"image": work["image"], "text_input": CAPTIONS}
        expected: dict[str, Any] = {
            "features": features,
            "embeds": embeds,
            "query": model.extract_features(samples).multimodal_embeds,
            "text": model.extract_features(samples, mode="text").text_embeds,
            "similarity": model.inference(embeds, features, CAPTIONS),
        }
        losses = model.train()(
            {**samples, "target": work["target"], "query_id": work["ids"]}, {**draws, "dsu_gate": 0.0}
        )
        expected |= {name: loss.detach() for name, loss in losses.items()}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)
        exported = load_file(tmp_path / f"{kind}.exported.safetensors")
        own = official_state_dict(model)
        assert exported.keys() == own.keys() and all(torch.equal(exported[name], own[name]) for name in own)
        cleaned = json.loads((tmp_path / f"{kind}.cleaned.json").read_text(encoding="utf-8"))
        assert cleaned == BlipCaptionProcessor()("A  Red (coat), please!")


def test_without_lavis_the_plugin_says_what_to_install() -> None:
    import importlib.util

    if importlib.util.find_spec("lavis") is not None:
        pytest.skip("LAVIS is installed here")
    with pytest.raises(ImportError, match="pip install packages/fafa/lavis"):
        importlib.import_module("fafa.lavis_plugin")
