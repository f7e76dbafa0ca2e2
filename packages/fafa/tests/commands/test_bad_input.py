"""Whatever a user gets wrong is one line that names it, status 2, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fafa.cli import infer_main, train_main
from fafa.options import check_training_flags, get_args
from tbps_common.errors import InputError
from tbps_world.tiny.fafa import write_toy_data

REQUIRED = ["--dataset", "cpr", "--syncpr-data-path", "syncpr", "--itcpr-root", "itcpr"]


def refused_line(status: int, capsys: pytest.CaptureFixture[str], out: Path | None = None) -> str:
    """The one line that the user reads."""
    assert status == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert out is None or not out.exists()
    return line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "fashioniq"], "Dataset should be 'CPR'"),
        (["--transform", "crop"], "squarepad"),
        (["--batch-size", "0"], "at least 1"),
        (["--batch-size", "many"], "whole number"),
        (["--learning-rate", "nan"], "finite"),
        (["--learning-rate", "0"], "above 0"),
        (["--num-epochs", "1.5"], "whole number"),
        (["--amp-dtype", "fp8"], "fp16"),
        (["--blip-model-name", "blip2_cir_cat"], "blip2_fafa_cpr"),
        (["--exp-name", "a/b"], "path separator"),
        (["--eval-cache-gb", "-1"], "at least 0"),
        (["--unheard-of"], "unheard-of"),
    ],
)
def test_values_are_checked_while_parsing(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        get_args([*REQUIRED, *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--dataset", "--syncpr-data-path", "--itcpr-root"])
def test_required_flags(flag: str) -> None:
    place = REQUIRED.index(flag)
    with pytest.raises(SystemExit):
        get_args(REQUIRED[:place] + REQUIRED[place + 2 :])


def test_defaults_are_the_readmes() -> None:
    args = get_args(REQUIRED)
    expected = {
        "json_path": "SynCPR.json", "num_workers": 2, "num_epochs": 10, "exp_name": "cir", "backbone": "pretrain",
        "blip_model_name": "blip2_fafa_cpr", "num_query_token": None, "resume_path": None, "learning_rate": 2e-6,
        "batch_size": 256, "setting": ["omini"], "loss_fda": 1.0, "loss_fd": 1.0, "loss_mfr": 0.5, "fda_k": 6,
        "fda_alpha": 0.5, "fd_margin": 0.5, "validation_frequency": 1, "validation_step": 1_000_000,
        "target_ratio": 1.25, "transform": "targetpad", "save_training": False, "save_best": False,
        "save_last": False, "save_memory": False, "seed": None, "amp_dtype": "fp16", "output_dir": "output/cpr",
        "eval_batch_size": 64, "eval_num_workers": 2, "max_steps": None, "no_code_backup": False,
        "use_fda_alpha": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert get_args([*REQUIRED, "--validation-step", "1e6"]).validation_step == 1_000_000
    assert get_args([*REQUIRED, "--dataset", "CPR"]).dataset == "CPR"
    assert get_args([*REQUIRED, "--setting", "a", "b"]).setting == ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fda-k", "9", "--num-query-token", "8"], "--fda-k 9"),
        (["--seed", "-1"], "--seed -1"),
        (["--resume", "auto", "--resume-path", "x.pt"], "give one of them"),
        (["--gather"], "--bad-images stop"),
    ],
)
def test_impossible_combinations(flags: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_training_flags(get_args([*REQUIRED, *flags]))


def test_flags_without_effect_are_named() -> None:
    def warnings(*flags: str) -> str:
        return " ".join(check_training_flags(get_args([*REQUIRED, *flags])))

    assert "--save-best without --save-training" in warnings("--save-best")
    assert "add --save-best or --save-last" in warnings("--save-training")
    assert "--save-memory has no effect" in warnings("--save-memory")
    assert warnings("--save-training", "--save-last") == ""


Break = Callable[[Path], list[str]]


def remove(name: str) -> Break:
    def change(folder: Path) -> list[str]:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return []

    return change


def write(name: str, text: str) -> Break:
    def change(folder: Path) -> list[str]:
        (folder / name).write_text(text, encoding="utf-8")
        return []

    return change


def flags(*values: str) -> Break:
    return lambda folder: [value.replace("FOLDER", str(folder)) for value in values]


def ids_that_do_not_meet(folder: Path) -> list[str]:
    path = folder / "itcpr" / "gallery.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([{**record, "instance_id": -1} for record in records]))
    return []


def small_pictures(folder: Path) -> list[str]:
    from PIL import Image

    for path in (folder / "syncpr").rglob("*.png"):
        with Image.open(path) as picture:
            picture.resize((64, 128)).save(path)
    return []


def yaml_with(text: str) -> Break:
    def change(folder: Path) -> list[str]:
        (folder / "other.yaml").write_text(text, encoding="utf-8")
        return ["--backbone", str(folder / "other.yaml")]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove("syncpr"), "--syncpr-data-path"),
        (remove("syncpr/SynCPR.json"), "SynCPR.json"),
        (remove("syncpr/test1"), "none of the 32 images"),
        (write("syncpr/SynCPR.json", "[]"), "holds no triplet"),
        (write("syncpr/SynCPR.json", '[{"edit_caption": 3}]'), "record 0"),
        (write("syncpr/SynCPR.json", "[{"), "SynCPR.json"),
        (small_pictures, "--transform squarepad"),
        (remove("itcpr"), "--itcpr-root"),
        (remove("itcpr/query.json"), "query.json"),
        (remove("itcpr/gallery.json"), "gallery.json"),
        (remove("itcpr/LAST/000009/9_9.png"), "9_9.png"),
        (write("itcpr/query.json", "[]"), "query.json"),
        (write("itcpr/query.json", '[{"file_path": "../../secret.png"}]'), "record 0"),
        (ids_that_do_not_meet, "do not match"),
        (flags("--batch-size", "17"), "--batch-size 17"),
        (flags("--json-path", "absent.json"), "absent.json"),
        (flags("--fda-k", "9"), "--fda-k 9"),
        (flags("--num-query-token", "4"), "--fda-k 6"),
        (flags("--backbone", "pretrain_vitH"), "pretrain_vitH"),
        (flags("--backbone", "FOLDER/absent.yaml"), "absent.yaml"),
        (yaml_with("model: [1"), "other.yaml"),
        (yaml_with("model: {image_size: 28}"), "num_query_token"),
        (yaml_with("model: {image_size: 30, num_query_token: 8}"), "patch_size"),
        (flags("--resume-path", "absent.pt"), "--resume-path absent.pt"),
        (flags("--resume", "absent"), "--resume absent"),
        (flags("--resume", "auto"), "--resume auto"),
        (flags("--device", "tpu"), "--device tpu"),
    ],
)
def test_training_is_refused_before_anything_is_written(
    change: Break,
    said: str,
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = tmp_path / "data", tmp_path / "out"
    write_toy_data(folder)
    more = change(folder)
    roots = ("--syncpr-data-path", str(folder / "syncpr"), "--itcpr-root", str(folder / "itcpr"))
    assert said in refused_line(train_main(train_flags(out, *roots, *more)), capsys, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_missing_gpu_is_refused_where_it_was_asked_for(
    tmp_path: Path, train_flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused_line(train_main(train_flags(tmp_path / "out", "--device", "cuda")), capsys, tmp_path / "out")
    assert "--device cpu" in line


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "another model"])
def test_weights_that_cannot_be_used_are_named(
    damage: str,
    tmp_path: Path,
    trained_run: Path,
    toy: Path,
    train_flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    path = run / "saved_models" / "tuned_last_recall_at1.pt"
    if damage == "another model":
        torch.save({"model": {"base_model.visual.conv1.weight": torch.zeros(3)}}, path)
    else:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[damage])
    start = train_main(train_flags(tmp_path / "out", "--resume-path", str(path)))
    if damage != "another model":  # released behaviour: what does not fit is left out, and counted in the log
        assert str(path) in refused_line(start, capsys, tmp_path / "out")
    capsys.readouterr()
    flags = ["--exp-dir", str(run), "--model-name", path.name, "--itcpr-root", str(toy / "itcpr"), "--device", "cpu"]
    assert str(path) in refused_line(infer_main(flags), capsys)
    assert not list(run.glob("inference_results_*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove("training_hyperparameters.json"), "training_hyperparameters.json"),
        (write("training_hyperparameters.json", "{"), "training_hyperparameters.json"),
        (write("training_hyperparameters.json", "[]"), "one JSON object"),
        (write("training_hyperparameters.json", '{"fda_k": "six"}'), "fda_k"),
        (write("training_hyperparameters.json", '{"transform": "crop"}'), "transform"),
        (write("training_hyperparameters.json", '{"fda_k": 20}'), "8 query tokens"),
        (write("model_config.yaml", "model: 3"), "model_config.yaml"),
        (flags("--exp-dir", "FOLDER/absent"), "--exp-dir"),
        (flags("--model-name", "absent.pt"), "tuned_last_recall_at1.pt"),
        (flags("--itcpr-root", "FOLDER/absent"), "--itcpr-root"),
        (flags("--fda-k-sweep", "4", "9"), "--fda-k-sweep 9"),
    ],
)
def test_inference_is_refused_with_one_line(
    change: Break,
    said: str,
    tmp_path: Path,
    trained_run: Path,
    toy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    base = ["--exp-dir", str(run), "--model-name", "tuned_last_recall_at1.pt", "--itcpr-root", str(toy / "itcpr")]
    line = refused_line(infer_main([*base, "--device", "cpu", "--num-workers", "0", *change(run)]), capsys)
    assert said in line
    assert not list(run.glob("inference_results_*"))


def test_unknown_inference_flags_are_refused() -> None:
    with pytest.raises(SystemExit):
        infer_main(["--exp-dir", "x", "--dataset", "cirr"])
    with pytest.raises(SystemExit):
        infer_main([])
