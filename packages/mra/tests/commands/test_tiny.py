"""`mra-make-tiny`: every file fits the released layout and the others; the paper's commands run on it as printed."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mra import Retrieval, build_tokenizer, load_config, tokenize
from tbps_world.cli import mra_tiny_main
from tbps_world.tiny.mra import PRESETS, make_vocabulary

Start = Callable[..., subprocess.Popen[str]]
LEXICON = ["a", "man", "T-shirt", "red", "knee-length", "man", "42nd", "coat"]


@pytest.fixture(scope="module", params=sorted(PRESETS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    (root / "lexicon.txt").write_text("\n".join(LEXICON), encoding="utf-8")
    arguments = ["--out", str(root / "T"), "--lexicon", str(root / "lexicon.txt"), "--preset", request.param]
    assert mra_tiny_main(arguments) == 0
    return root / "T"


def test_vocabulary_has_the_stated_order_and_knows_every_ascii_word(made: Path) -> None:
    tokens = (made / "data/bert-base-uncased/vocab.txt").read_text(encoding="utf-8").splitlines()
    assert tokens[:7] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    assert tokens == make_vocabulary(LEXICON) and len(tokens) == len(set(tokens))
    assert tokens[tokens.index("man") :] == ["man", "shirt", "red", "knee", "length", "42nd", "coat"]
    tokenizer = build_tokenizer(made / "data/bert-base-uncased")
    ids, _ = tokenize(tokenizer, ["Zebra-crossing (at 9:30) & 'quoted' words; a_b~c", "man in a coat"], 56)
    assert tokens.index("[UNK]") not in ids.unique().tolist()
    assert ids[1, 1] == tokens.index("man")


def test_checkpoints_load_strictly_and_start_weights_fit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    for task, name in (("sda", "pretrain"), ("cuhk", "ft_cuhk"), ("icfg", "ft_icfg"), ("rstp", "ft_rstp")):
        stored = torch.load(f"data/checkpoint/{name}.pth", weights_only=True)
        assert stored["config"] == load_config(f"configs/{task}.yaml")
        model = Retrieval(stored["config"], init_backbones=False)
        model.load_state_dict(stored["model"], strict=True)
        assert Path(f"data/checkpoint/{name}.pth").stat().st_size < 10_000_000
    model = Retrieval(load_config("configs/sda.yaml"), init_backbones=True)
    pretrained = torch.load("data/checkpoint/pretrain.pth", weights_only=True)["model"]
    for key in ("vision_encoder.patch_embed.proj.weight", "text_encoder.bert.embeddings.word_embeddings.weight"):
        assert torch.equal(model.state_dict()[key], pretrained[key])
    cuhk = load_config("configs/cuhk.yaml")
    assert Retrieval(cuhk, init_backbones=False).load_pretrained("data/checkpoint/pretrain.pth", cuhk) == ([], [])
    rstp = load_config("configs/rstp.yaml")
    missing, unexpected = Retrieval(rstp, init_backbones=False).load_pretrained("data/checkpoint/pretrain.pth", rstp)
    assert (len(missing), len(unexpected)) == (4, 14)


def test_text_encoder_is_a_bert_of_the_library(made: Path) -> None:
    from transformers import BertForMaskedLM

    model, report = BertForMaskedLM.from_pretrained(made / "data/bert-base-uncased", output_loading_info=True)
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert model.config.vocab_size == len(make_vocabulary(LEXICON))


def test_same_seed_same_bytes_other_seed_other_weights(made: Path, tmp_path: Path) -> None:
    (tmp_path / "lexicon.txt").write_text("\n".join(LEXICON), encoding="utf-8")
    preset = "toy" if (made / "configs/config_swin_tiny_128x64.json").exists() else "tiny"
    arguments = ["--out", str(tmp_path / "T"), "--lexicon", str(tmp_path / "lexicon.txt"), "--preset", preset]
    assert mra_tiny_main(arguments) == 0
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "T") for path in (tmp_path / "T").rglob("*") if path.is_file())
    assert all((made / name).read_bytes() == (tmp_path / "T" / name).read_bytes() for name in files)
    assert mra_tiny_main([*arguments, "--seed", "1"]) == 0
    name = "data/checkpoint/ft_cuhk.pth"
    assert (made / name).read_bytes() != (tmp_path / "T" / name).read_bytes()


def test_tiny_sizes_are_the_specified_ones(tmp_path: Path) -> None:
    (tmp_path / "lexicon.txt").write_text("man\n", encoding="utf-8")
    assert mra_tiny_main(["--out", str(tmp_path / "T"), "--lexicon", str(tmp_path / "lexicon.txt")]) == 0
    configs = tmp_path / "T" / "configs"
    small = json.loads((configs / "config_swin_tiny_96x96.json").read_text())
    large = json.loads((configs / "config_swin_tiny_192x128.json").read_text())
    common = {"vision_width": 64, "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
    assert common.items() <= small.items() and common.items() <= large.items()
    keys = ("image_res", "h", "w", "window_size", "drop_rate", "drop_path_rate")
    assert [small[key] for key in keys] == [96, 96, 96, 3, 0.1, 0.2]
    assert [large[key] for key in keys] == [192, 192, 128, 2, 0, 0.1]
    text = json.loads((configs / "config_bert_tiny.json").read_text())
    keys = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
    assert [text[key] for key in keys] == [48, 4, 12, 96, 64] and text["fusion_layer"] == 6
    for task in ("sda", "cuhk", "icfg", "rstp"):
        config, released = load_config(configs / f"{task}.yaml"), load_config(f"configs/{task}.yaml")
        assert config["embed_dim"] == (256 if task == "rstp" else 64)
        assert (config["batch_size_train"], config["batch_size_test"], config["batch_size_test_text"]) == (8, 16, 64)
        assert config["k_test"] == 16 and config["schedular"]["epochs"] == 1
        assert config["schedular"]["num_warmup_steps"] == (4 if task == "sda" else 0.1)
        assert config.get("window_size") == (None if task == "sda" else 2)
        assert config.get("synonyms") == (None if task == "sda" else "data/synonyms.json")
        unchanged = ("max_tokens", "max_words", "patch_size", "lr_2", "eda", "erasing_p", "optimizer", "region", "temp")
        assert all(config[key] == released[key] for key in unchanged)


@pytest.mark.slow
def test_commands_of_the_readme_run_as_printed(tmp_path: Path, start_script: Start) -> None:
    """The three commands of the paper, in a folder of tbps-synth and mra-make-tiny, without any other flag."""
    from tbps_world.cli import synth_main

    root = tmp_path / "T"
    layouts = "cuhk,icfg,rstp,finetune,sda"
    assert synth_main(["--out", str(root), "--preset", "tiny", "--layouts", layouts, "--ids", "16"]) == 0
    assert mra_tiny_main(["--out", str(root), "--lexicon", str(root / "lexicon.txt"), "--seed", "0"]) == 0
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r'^python3 run\.py (--task "(?:sda|cuhk)".*)$', readme, re.MULTILINE)[:3]
    assert ["--evaluate" in command for command in commands] == [False, False, True]
    for command in commands:
        process = start_script("run.py", command.replace('"', "").split(), cwd=root)
        out, errors = process.communicate(timeout=580)
        assert process.returncode == 0, out + errors
    assert (root / "out/pre_sda/checkpoint_0.pth").is_file()
    assert "### test_result:" in out
    shutil.rmtree(root)
