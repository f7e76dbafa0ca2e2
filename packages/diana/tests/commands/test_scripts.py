"""The shell scripts: the released flags, every value overridable, and what is checked before anything starts."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from diana.launch import launch_command
from tbps_common.run.command import usable_processors

PACKAGE = Path(__file__).resolve().parents[2]
LAYOUT = PACKAGE / "DiaNA"
Words = Callable[..., list[str]]

# Flag -> (pretrain.sh, finetune.sh), as released; None: not passed.
RELEASED = {
    "enable_refiner": ("True", "True"),
    "enable_sdm": ("False", "True"),
    "num_query": ("24", "16"),
    "sim_type": ("avg", "avg"),
    "drop_path_rate": ("0.2", "0.2"),
    "dataset_name": ("mals", "chatpedes"),
    "dataset_config_path": ("configs/dataset_config.yaml", None),
    "max_seq_length": ("56", "400"),
    "mask_probability": ("0.15", "0.15"),
    "enable_random_turn": (None, "True"),
    "force_image_size": ("384 192", "384 192"),
    "pad_to_max_length": ("True", "True"),
    "version": ("customized", "customized"),
    "overwrite_output_dir": ("True", "True"),
    "dataloader_num_workers": ("8", "8"),
    "bf16": ("True", "True"),
    "num_train_epochs": ("3", "10"),
    "per_device_train_batch_size": ("64", "32"),
    "gradient_accumulation_steps": ("1", "1"),
    "evaluation_strategy": ("no", "no"),
    "save_strategy": ("epoch", "epoch"),
    "save_total_limit": ("1", None),
    "learning_rate": ("1e-4", "1e-5"),
    "weight_decay": ("0.05", "0.05"),
    "warmup_steps": ("1000", "50"),
    "lr_scheduler_type": ("cosine", "cosine"),
    "logging_steps": ("10", "10"),
    "log_level": ("error", "error"),
    "do_train": ("True", "True"),
    "optim": ("adamw_torch", "adamw_torch"),
    "adam_beta1": ("0.9", "0.9"),
    "adam_beta2": ("0.98", "0.999"),
    "report_to": ("none", "none"),
    "deepspeed": ("zero_stage3_config.json", "zero_stage3_config.json"),
    "pretrained": (None, "work_dirs/pretrain"),
    "output_dir": ("work_dirs/pretrain", "work_dirs/finetune"),
}


def as_flags(words: list[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            flags[name] = ""
        else:
            flags[name] = f"{flags[name]} {word}".strip()
    return flags


@pytest.fixture
def plain_environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"]}


@pytest.mark.parametrize("column", [0, 1], ids=["pretrain.sh", "finetune.sh"])
def test_scripts_hold_the_released_values(column: int, plain_environment: dict[str, str], script_words: Words) -> None:
    script = ("pretrain.sh", "finetune.sh")[column]
    words = script_words(script, plain_environment)
    start = words.index("main/train/train.py")
    assert words[:2] == ["-m", "diana.launch"]
    assert words[2:start] == [
        *("--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1"),
        *(f"--nproc_per_node={(8, 4)[column]}", f"--master_port={(34229, 34230)[column]}"),
    ]
    flags = as_flags(words[start + 1 :])
    for name in ("vision_pretrained", "llama_pretrained"):
        assert flags.pop(name).startswith("<")
    assert flags.pop("config_dir") == "configs"
    assert flags == {name: values[column] for name, values in RELEASED.items() if values[column] is not None}


def test_variables_and_trailing_words_override(plain_environment: dict[str, str], script_words: Words) -> None:
    values = {
        "GPUS": "2",
        "BATCH_SIZE": "7",
        "OUTPUT_DIR": "a b/out",
        "PRETRAINED": "start",
        "VISION_PRETRAINED": "swin",
        "LLAMA_PRETRAINED": "llama",
        "MASTER_PORT": "1234",
        "CONFIG_DIR": "sizes",
    }
    words = script_words("finetune.sh", {**plain_environment, **values}, "--num_query", "5", "--learning_rate", "3e-4")
    assert {"--nproc_per_node=2", "--master_port=1234"} <= set(words)
    flags = as_flags(words[words.index("main/train/train.py") + 1 :])
    assert flags["per_device_train_batch_size"] == "7"
    assert flags["output_dir"] == "a b/out"
    assert [flags[name] for name in ("pretrained", "vision_pretrained", "llama_pretrained", "config_dir")] == [
        *("start", "swin", "llama", "sizes"),
    ]
    assert words[-4:] == ["--num_query", "5", "--learning_rate", "3e-4"]


@pytest.mark.parametrize("script", ["pretrain.sh", "finetune.sh"])
def test_several_nodes(script: str, plain_environment: dict[str, str], script_words: Words) -> None:
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host7"}
    words = script_words(script, {**plain_environment, **nodes})
    assert words[2:5] == ["--nnodes=2", "--node_rank=1", "--master_addr=host7"]
    launched = launch_command([*words[2 : words.index("main/train/train.py")], "train.py"], 1)
    assert launched[1:5] == ["-m", "torch.distributed.run", "--nnodes=2", "--node_rank=1"]


@pytest.mark.parametrize(
    ("variables", "visible"),
    [
        ({}, "0,1,2,3"),
        ({"GPUS": "8"}, "all"),
        ({"CUDA_VISIBLE_DEVICES": "5"}, "5"),
        ({"CUDA_VISIBLE_DEVICES": "5,6", "GPUS": "2"}, "5,6"),
    ],
)
def test_finetuning_hides_no_gpu_that_was_asked_for(
    variables: dict[str, str], visible: str, plain_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        ["bash", "shell/finetune.sh"],
        cwd=LAYOUT / "train",
        env={
            **{**plain_environment, **variables},
            "PYTHON": str(PACKAGE / "tests" / "print_arguments.sh"),
            "REAL_PYTHON": sys.executable,
            "PRINTER": "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == visible, done.stderr


def test_eval_script(plain_environment: dict[str, str], script_words: Words) -> None:
    words = script_words("eval.sh", plain_environment, "--turn_limit", "1", "2")
    assert words[0] == "clip_benchmark/cli.py"
    assert as_flags(words[1:]) == {
        "pretrained": "../train/work_dirs/finetune",
        "dataset": "chatpedes",
        "dataset_config_path": "configs/dataset_config.yaml",
        "batch_size": "128",
        "max_seq_length": "400",
        "turn_limit": "1 2",
        "mode": "global",
        "version": "customized",
        "output_dir": "work_dirs/finetune",
    }


def test_both_copies_of_the_data_configuration_are_the_released_one() -> None:
    texts = [
        (LAYOUT / side / "configs" / "dataset_config.yaml").read_text(encoding="utf-8") for side in ("train", "eval")
    ]
    assert texts[0] == texts[1]
    content = yaml.safe_load(texts[0])
    assert content["chatpedes"]["mean"] == [0.38901278, 0.3651612, 0.34836376]
    assert content["mals"]["std"] == [0.3088255, 0.29743394, 0.301009]
    shards = [Path(name).name for name in content["mals"]["train_annotation"]]
    assert len(shards) == 91
    assert shards[:3] == ["g_4x_attrs.json", "g_c_g_a_attrs.json", "g_c_g_a_0_attrs.json"]
    assert shards[45:48] == ["g_c_g_a_43_attrs.json", "g_i_g_a_attrs.json", "g_i_g_a_0_attrs.json"]


def test_the_shipped_sizes_are_the_papers() -> None:
    from diana import DiaNAConfig

    config = DiaNAConfig.from_pretrained(LAYOUT / "train" / "configs")
    assert config.checkpoint_dtype is torch.bfloat16
    assert (config.vision_config["depths"], config.llama_config["num_hidden_layers"]) == ([2, 2, 18, 2], 16)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_files_say_what_is_followed_without_deepspeed(stage: int) -> None:
    import json

    from diana.schedule import WarmupDecay, read_deepspeed_file

    path = LAYOUT / "train" / f"zero_stage{stage}_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["zero_optimization"]["stage"] == stage
    assert content["wall_clock_breakdown"] is False
    assert "optimizer" not in content  # the trainer's own has the groups without weight decay
    file = read_deepspeed_file(str(path))
    assert file.schedule == WarmupDecay("log", None, None, None)
    assert file.clipping is None


@pytest.mark.parametrize(
    ("devices", "cpu_processes", "processes"),
    [(0, 1, 1), (1, 1, 1), (2, 1, 2), (8, 1, 4), (0, 2, min(2, usable_processors())), (0, 999, usable_processors())],
)
def test_as_many_processes_as_there_are_devices(devices: int, cpu_processes: int, processes: int) -> None:
    argv = ["--nproc_per_node=4", f"--cpu_processes={cpu_processes}", "--master_port=5", "train.py", "--num_query", "3"]
    words = launch_command(argv, devices)
    assert words[0] == sys.executable
    if processes == 1:
        assert words[1:] == ["train.py", "--num_query", "3"]
    else:
        assert words[1:3] == ["-m", "torch.distributed.run"]
        assert f"--nproc_per_node={processes}" in words
        assert "--master_port=5" in words
        assert words[-3:] == ["train.py", "--num_query", "3"]


def test_a_wrong_number_of_cpu_processes_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CPU_PROCESSES", "two")
    with pytest.raises(SystemExit):
        launch_command(["train.py"], 0)
    assert "--cpu_processes: invalid int value: 'two'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("pretrain.sh", {"VISION_PRETRAINED": ""}, "set VISION_PRETRAINED"),
        ("pretrain.sh", {"LLAMA_PRETRAINED": ""}, "set LLAMA_PRETRAINED"),
        ("pretrain.sh", {"DIANA_DATA_ROOT": ""}, "DIANA_DATA_ROOT"),
        ("finetune.sh", {}, "run shell/pretrain.sh first, or set PRETRAINED"),
        ("finetune.sh", {"PRETRAINED": "<Somewhere>/DiaNA-Pretrain"}, "set PRETRAINED"),
    ],
)
def test_what_is_missing_is_told_in_one_line_before_torch_is_loaded(
    script: str, variables: dict[str, str], message: str, script_environment: dict[str, str], tmp_path: Path
) -> None:
    # An empty value is taken for one that is not set, as ${NAME:-default} has it.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n", encoding="utf-8")
    done = subprocess.run(
        ["bash", f"shell/{script}"],
        cwd=LAYOUT / "train",
        env={**script_environment, "OUTPUT_DIR": str(tmp_path / "out"), "PYTHONPATH": str(tmp_path), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_readme_commands_run_on_the_synthetic_world(
    script_environment: dict[str, str], sizes: list[str], tmp_path: Path
) -> None:
    """The paper's lines, typed in packages/diana: the first as it stands, the others with sizes for a laptop."""
    stages = ("pretrain", "finetune", "evaluation")
    folders = {stage: str(tmp_path / stage) for stage in stages}

    def typed(line: str, stage: str) -> str:
        start = folders["finetune" if stage == "evaluation" else "pretrain"]
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=PACKAGE,
            env={**script_environment, "OUTPUT_DIR": folders[stage], "PRETRAINED": start},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sizes_and_steps = shlex.join([*sizes, "--max_steps", "2"])
    shown = typed("cd DiaNA/train && bash shell/pretrain.sh", "pretrain")
    assert "using the CPU with 1 process(es)" in shown or torch.cuda.is_available()
    typed(f"cd DiaNA/train && bash shell/finetune.sh {sizes_and_steps}", "finetune")
    shown = typed("cd DiaNA/eval && bash shell/eval.sh --num_workers 0", "evaluation")
    assert "Best metrics:" in shown
    assert (tmp_path / "evaluation" / "metrics.json").is_file()
