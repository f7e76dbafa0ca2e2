"""The flags of train.py: names, types and defaults of the released code, and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlfa.options import build_parser, check_training_flags, flag_problem, get_args, image_size
from tbps_common.errors import InputError


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.golden("cmlfa", kind="config")
def test_defaults_and_parsed_commands_equal_the_released_code(golden: Any, golden_name: str) -> None:
    case = golden(golden_name).case
    for argv, expected in (([], "defaults"), (case["argv"], "parsed"), (case["argv2"], "parsed2")):
        parsed = vars(get_args(argv))
        assert {name: plain(parsed[name]) for name in case[expected]} == case[expected]


@pytest.mark.parametrize(
    "words", [["384,128"], ["384", "128"], ["384 128"], ["(384,128)"], ["(384,", "128)"], ["384x128"]]
)
def test_image_size_is_read_in_any_form(words: list[str]) -> None:
    assert get_args(["--img_size", *words, "--img_aug"]).img_size == (384, 128)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_image_size_reads_back_what_python_prints(height: int, width: int) -> None:
    assert image_size(str((height, width))) == image_size(f"{height},{width}") == (height, width)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--img_size", "384"),
        ("--img_size", "384,0"),
        ("--img_size", "1,2,3"),
        ("--img_size", "a,b"),
        ("--log_period", "0"),
        ("--log_period", "ten"),
        ("--eval_period", "-1"),
        ("--batch_size", "0"),
        ("--batch_size", "2.5"),
        ("--num_epoch", "0"),
        ("--num_workers", "-1"),
        ("--temperature", "0"),
        ("--temperature", "nan"),
        ("--lr", "inf"),
        ("--lr", "-1e-5"),
        ("--alpha", "1"),
        ("--lfa_dropout", "1.5"),
        ("--text_length", "2"),
        ("--optimizer", "RMSprop"),
        ("--lrscheduler", "cyclic"),
        ("--warmup_method", "cubic"),
        ("--dataset_name", "CUHK"),
        ("--sampler", "balanced"),
        ("--loss_names", "sdm+triplet"),
        ("--loss_names", "+"),
        ("--lfa_attention", "heads"),
        ("--precision", "bf16"),
        ("--device", "tpu"),
        ("--seed", "-1"),
        ("--name", "../elsewhere"),
        ("--milestones", "-3"),
        ("--no_such_flag", "1"),
        ("--batch", "64"),
    ],
)
def test_unusable_value_ends_with_status_2_and_names_the_flag(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        get_args([flag, value])
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("spelling", ["Adamw", "ADAMW", "adamw", "AdamW"])
def test_optimizer_is_accepted_in_any_case(spelling: str) -> None:
    assert get_args(["--optimizer", spelling]).optimizer == "AdamW"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--loss_names", "sdm+mlm"], "--MLM"),
        (["--loss_names", "sdm", "--test"], "test.py"),
        (["--loss_names", "sdm", "--sampler", "identity", "--num_instance", "200"], "--num_instance"),
        (["--loss_names", "sdm", "--sampler", "identity", "--num_instance", "5"], "multiple"),
        (["--loss_names", "sdm", "--milestones", "50", "20"], "--milestones"),
        (["--loss_names", "sdm", "--resume_ckpt_file", "x.pth"], "--resume"),
    ],
)
def test_contradicting_flags_are_refused(argv: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_training_flags(get_args(argv))


def test_masked_captions_without_their_loss_are_allowed() -> None:
    check_training_flags(get_args(["--MLM", "--loss_names", "sdm + id"]))


def test_every_default_is_a_value_its_own_flag_accepts() -> None:
    for name, value in vars(get_args([])).items():
        assert flag_problem(name, value) is None


def test_every_flag_explains_itself() -> None:
    assert all(action.help for action in build_parser()._actions)
