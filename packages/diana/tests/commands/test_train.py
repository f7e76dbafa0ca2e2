"""train.py with the scripts' flags: what it prints, what it writes, and what flags change."""

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diana.cli import train_main

Flags = Callable[..., list[str]]
LOG_KEYS = ["time", "epoch", "step", "loss", "loss_itc", "loss_sdm", "loss_refine", "logit_scale", "grad_norm", "learning_rate"]  # fmt: skip


def log_lines(shown: str) -> list[dict]:
    return [ast.literal_eval(line) for line in shown.splitlines() if line.startswith("{'time'")]


def test_pretraining_leaves_a_model_and_a_checkpoint(pretrained: Path) -> None:
    assert {path.name for path in pretrained.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("arguments.json", "train_log.jsonl", "checkpoint-3"),
    }
    inside = {path.name for path in (pretrained / "checkpoint-3").iterdir()}
    assert inside >= {"config.json", "model.safetensors", "tokenizer.json", "trainer_state.json", "training_args.bin"}
    assert inside >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    config = json.loads((pretrained / "config.json").read_text(encoding="utf-8"))
    assert config["vision_config"]["image_size"] == [64, 32]
    assert config["refiner_config"]["enable_refiner"] is True
    assert config["refiner_config"]["num_query"] == 3
    assert config["model_type"] == "main"
    assert "use_cache" not in config
    lines = [json.loads(line) for line in (pretrained / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["tokens_per_second"] > 0 and 0 <= line["padding"] < 1 for line in lines)


def test_finetuning_starts_from_it_and_prints_the_released_lines(
    pretrained: Path, data_root: Path, train_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = train_flags("finetune", tmp_path, "--num_train_epochs", "1", "--num_query", "2")
    assert train_main([*flags, "--pretrained", str(pretrained), "--max_steps", "2"]) == 0
    shown = capsys.readouterr().out
    records = json.loads((data_root / "ChatPedes" / "train_reid.json").read_text(encoding="utf-8"))
    dialogues = sum(1 if isinstance(record["chats"][0][0], dict) else len(record["chats"]) for record in records)
    assert f"There are {len(records)} images.\nThere are {len({r['id'] for r in records})} ids." in shown
    assert f"There are {dialogues} captions." in shown
    model = load_file(tmp_path / "model.safetensors")
    total = sum(tensor.numel() for tensor in model.values())
    assert f"number of total params: {total / 1000:.2f} K" in shown
    lines = log_lines(shown)
    assert [list(line) for line in lines] == [LOG_KEYS, LOG_KEYS]
    assert lines[0]["learning_rate"] == 0.0
    assert math.isclose(
        lines[0]["loss"], sum(lines[0][name] for name in ("loss_itc", "loss_sdm", "loss_refine")), abs_tol=2e-4
    )
    assert "train_samples" in shown
    # Another number of attribute queries begins them anew and keeps everything else that pre-training left.
    start = load_file(pretrained / "model.safetensors")
    assert model["refiner.attr_query_token"].shape[1] == 2
    assert torch.allclose(model["llama.embed_tokens.weight"], start["llama.embed_tokens.weight"], atol=1e-3)


def test_the_schedule_is_deepspeeds_or_the_named_one(
    data_root: Path, train_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--max_steps", "5", "--warmup_steps", "3", "--learning_rate", "1e-3", "--save_strategy", "no"]
    assert train_main(train_flags("pretrain", tmp_path / "a", *common)) == 0
    rates = [line["learning_rate"] for line in log_lines(capsys.readouterr().out)]
    # lr(1) = 0, then gamma(0), gamma(1), gamma(2) = ln(i + 1) / ln 3, then the linear decay to T = 5.
    gammas = [0, 0, math.log(2) / math.log(3), 1.0, 1.0]
    assert rates == pytest.approx([1e-3 * gamma for gamma in gammas])
    assert train_main(train_flags("pretrain", tmp_path / "b", *common, "--deepspeed", "")) == 0
    rates = [line["learning_rate"] for line in log_lines(capsys.readouterr().out)]
    cosine = [0.5 * (1 + math.cos(math.pi * (step - 3) / 2)) for step in (3, 4)]
    assert rates == pytest.approx([1e-3 * gamma for gamma in (0, 1 / 3, 2 / 3, *cosine)])


def test_old_names_of_flags_mean_what_they_meant(data_root: Path, train_flags: Flags, tmp_path: Path) -> None:
    flags = train_flags("pretrain", tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    assert "--evaluation_strategy" in flags  # from the script
    old = ["--no_cuda", "True", "--warmup_ratio", "0.25", "--warmup_steps", "0", "--save_safetensors", "True"]
    assert train_main([*flags, *old, "--past_index", "-1", "--logging_dir", str(tmp_path / "logs")]) == 0
    stored = json.loads((tmp_path / "out" / "arguments.json").read_text(encoding="utf-8"))
    assert stored["trainer"]["use_cpu"] is True
    assert stored["trainer"]["warmup_steps"] == 0.25
    assert stored["trainer"]["eval_strategy"] == "no"


def test_a_json_file_of_flags_is_the_same_run(data_root: Path, train_flags: Flags, tmp_path: Path) -> None:
    words = train_flags("pretrain", tmp_path / "a", "--max_steps", "2", "--save_strategy", "no")
    assert train_main(words) == 0
    values: dict[str, object] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            values[name] = []
        else:
            values[name] = [*values[name], word]  # type: ignore[misc]
    values = {name: value[0] if len(value) == 1 else value for name, value in values.items()}  # type: ignore[arg-type,index]
    values |= {"output_dir": str(tmp_path / "b"), "enable_refiner": True, "num_query": 3, "run_name": None}
    (tmp_path / "flags.json").write_text(json.dumps(values), encoding="utf-8")
    assert train_main([str(tmp_path / "flags.json")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_items_do_not_depend_on_workers(data_root: Path, train_flags: Flags, tmp_path: Path) -> None:
    common = ["--max_steps", "3", "--save_strategy", "no", "--drop_path_rate", "0.2"]
    for workers in ("0", "2"):
        flags = train_flags("pretrain", tmp_path / workers, *common, "--dataloader_num_workers", workers)
        assert train_main(flags) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "02")
    assert all(torch.equal(one[name], other[name]) for name in one)


THREE_STEPS = ("--max_steps", "3", "--learning_rate", "1e-2", "--warmup_steps", "2", "--save_strategy", "no")


@pytest.fixture(scope="module")
def untrained(world: Path, tmp_path_factory: pytest.TempPathFactory, train_flags: Flags) -> dict[str, torch.Tensor]:
    """The weights that pre-training starts with: those after a step with learning rate 0."""
    out = tmp_path_factory.mktemp("untrained")
    flags = train_flags("pretrain", out, *THREE_STEPS, "--learning_rate", "0", "--max_steps", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIANA_DATA_ROOT", str(world))
        assert train_main(flags) == 0
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("more", "trained"),
    [
        (
            ["--freeze_vision_model", "True"],
            {"llama", "text_projection", "refiner", "vision_projection", "logit_scale"},
        ),
        (["--freeze_model", "True", "--unfreeze_llama_projection", "True"], {"text_projection"}),
        (["--freeze_model", "True", "--use_llama_lora", "2"], {"llama"}),
    ],
)
def test_freezing_leaves_the_rest_to_train(
    more: list[str],
    trained: set[str],
    data_root: Path,
    train_flags: Flags,
    untrained: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    assert train_main(train_flags("pretrain", tmp_path, *THREE_STEPS, *more)) == 0
    start, end = untrained, load_file(tmp_path / "model.safetensors")
    adapters = {name for name in end if ".lora_" in name}
    assert bool(adapters) == ("--use_llama_lora" in more)
    plain = {name: name.replace("base_model.model.", "").replace(".base_layer", "") for name in end}
    changed = {name for name in end if name in adapters or not torch.equal(end[name], start[plain[name]])}
    assert {name.split(".")[0] for name in changed} == trained
    if adapters:
        assert changed == adapters


def test_layer_wise_rates_change_what_deep_layers_learn(
    data_root: Path,
    train_flags: Flags,
    untrained: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIT_LAYER_DECAY_RATE", "0")
    flags = ["--weight_decay", "0", "--use_custom_trainer", "True", "--drop_path_rate", "0"]
    assert train_main(train_flags("pretrain", tmp_path, *THREE_STEPS, "--learning_rate", "1e-3", *flags)) == 0
    start, end = untrained, load_file(tmp_path / "model.safetensors")
    embedding = "vision_model.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(start[embedding], end[embedding])  # rate 0^(n - 1) in the first layer
    assert not torch.equal(start["llama.norm.weight"], end["llama.norm.weight"])


def test_grouping_by_length_sees_every_sample_once() -> None:
    from diana.data.batches import TrainingBatches

    lengths = [(7 * number) % 50 for number in range(103)]
    for world in (1, 2):
        seen: list[int] = []
        spread = []
        for rank in range(world):
            batches = TrainingBatches(103, 4, seed=0, rank=rank, world_size=world, drop_last=False, lengths=lengths)
            batches.set_epoch(1)
            for keys in batches:
                seen += [key.index for key in keys]
                spread.append(max(lengths[k.index] for k in keys) - min(lengths[k.index] for k in keys))
        assert set(seen) == set(range(103))
        assert len(seen) == -(-103 // world) * world
        assert sorted(spread)[len(spread) // 2] <= 4
