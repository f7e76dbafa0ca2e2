"""diana-toy and diana-make-tiny."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from diana.data import PROMPT_POOL, SYSTEM_PROMPT
from diana.options import parse_train_flags
from diana.tokenizer import load_tokenizer
from tbps_world.cli import diana_tiny_main
from tbps_world.toys.diana import TAUGHT, chance_r1, environment, stage_flags


def test_the_tiny_tokenizer_has_llama_3s_layout(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "llama-tiny")
    n = tokenizer.vocab_size
    assert tokenizer("a red coat")["input_ids"][0] == tokenizer.bos_token_id == n
    assert [tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id] == [n + 1, n + 2, n + 4]
    assert len(tokenizer) == n + 5 == 600
    assert len(tokenizer(SYSTEM_PROMPT)["input_ids"]) < 55
    for text in (*PROMPT_POOL, "Ünïcode 漢字 🙂\n\ttabs", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text


def test_tiny_backbones_are_what_the_config_says_and_follow_the_seed(tiny: Path, tmp_path: Path) -> None:
    from diana import DiaNAConfig, DiaNAModel

    config = DiaNAConfig.from_pretrained(tiny / "configs")
    model = DiaNAModel.from_backbones(config, tiny / "swinv2-tiny", tiny / "llama-tiny")
    assert 4e5 < sum(parameter.numel() for parameter in model.parameters()) < 8e5
    for seed in ("0", "1"):
        assert diana_tiny_main(["--out", str(tmp_path / seed), "--image_size", "64", "32", "--seed", seed]) == 0
    weights = [(tmp_path / seed / "llama-tiny" / "model.safetensors").read_bytes() for seed in "01"]
    assert weights[0] == (tiny / "llama-tiny" / "model.safetensors").read_bytes() != weights[1]


def test_a_lexicon_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.txt").write_text("zebra\nzebra stripes\n", encoding="utf-8")
    assert diana_tiny_main(["--out", str(tmp_path / "t"), "--lexicon", str(tmp_path / "words.txt")]) == 0
    assert len(load_tokenizer(tmp_path / "t" / "llama-tiny")(" zebra")["input_ids"]) <= 3
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    for name in ("empty.txt", "absent.txt"):
        assert diana_tiny_main(["--out", str(tmp_path / "u"), "--lexicon", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "u").exists()


def test_sizes_of_the_towers_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diana import DiaNAConfig, DiaNAModel
    from tbps_world.toys.diana import TINY_FLAGS

    assert diana_tiny_main(["--out", str(tmp_path / "t"), *TINY_FLAGS]) == 0
    config = DiaNAConfig.from_pretrained(tmp_path / "t" / "configs")
    assert config.logit_scale == 10 and config.vision_config["depths"] == [2, 2]
    model = DiaNAModel.from_backbones(config, tmp_path / "t" / "swinv2-tiny", tmp_path / "t" / "llama-tiny")
    assert model.vision_projection.in_features == 96
    for wrong, sentence in (
        (["--depths", "1"], "1 stages and --num_heads 4"),
        (["--num_heads", *"3244"], "3 does not"),
    ):
        assert diana_tiny_main(["--out", str(tmp_path / "u"), *wrong]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_toy_appends_to_the_released_flags(
    stage: str, tmp_path: Path, script_words: Callable[..., list[str]], script_environment: dict[str, str]
) -> None:
    variables = {**script_environment, **environment(tmp_path, stage, tmp_path / "tiny")}
    words = script_words(f"{stage}.sh", variables, *stage_flags(stage, TAUGHT, 3))
    args, rest = parse_train_flags(words[words.index("main/train/train.py") + 1 :])
    assert args.force_image_size == [128, 64]
    assert args.overwrite_output_dir is False
    assert rest[-2:] == ["--max_steps", "3"]
    assert args.pretrained == (str(tmp_path / "pretrain") if stage == "finetune" else None)


def test_chance_is_the_share_of_right_pictures(tmp_path: Path) -> None:
    turn = [{"from": "gpt", "value": "q"}, {"from": "user", "value": "a"}]
    records = [{"id": 1, "chats": [turn]}, {"id": 1, "chats": [[turn], [turn]]}, {"id": 2, "chats": [turn]}]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    assert chance_r1(tmp_path / "a.json") == pytest.approx(100 * (3 * 2 / 3 + 1 / 3) / 4)
