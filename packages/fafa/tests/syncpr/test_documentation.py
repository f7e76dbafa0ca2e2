"""The page about the pipeline: its commands parse, its table is what the command computes."""

import re
import shlex
from pathlib import Path

import pytest

from fafa.cli import syncpr_main
from fafa.options import get_args
from fafa.syncpr.cost import lines
from fafa.syncpr.options import build_parser

PACKAGE = Path(__file__).resolve().parents[2]
PAGE = (PACKAGE / "docs" / "syncpr.md").read_text(encoding="utf-8")
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE + README, re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if re.search(r"fafa[-.]syncpr ", line)]


def test_every_stage_has_a_command_that_parses() -> None:
    found = commands()
    stages = set()
    for words in found:
        start = next(place for place, word in enumerate(words) if word in ("fafa-syncpr", "fafa.syncpr"))
        flags = build_parser().parse_args(words[start + 1 :])
        stages.add(flags.stage)
    assert stages == {"quadruples", "pairs", "lora", "images", "filter", "pack"}


def test_the_training_command_of_the_page_parses() -> None:
    block = re.search(r"^python src/blip_fine_tune_new\.py (.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert get_args(shlex.split(block[1].replace("\\\n", " "))).syncpr_data_path == "syncpr"


def test_the_costs_of_the_page_are_computed() -> None:
    rows = re.findall(r"^\| ([a-z, VLMCIP]+) \| (\d[^|]*) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    table = lines(build_parser().parse_args(["cost"]))
    assert [(line.stage, f"{line.hours:.1f}") for line in table] == [(stage, hours) for stage, _, hours in rows]
    for line, (_, arithmetic, _) in zip(table, rows):
        assert [float(number) for number in re.findall(r"\d[\d.]*", line.arithmetic.replace(",", ""))] == [
            float(number) for number in re.findall(r"\d[\d.]*", arithmetic.replace(",", ""))
        ]
    assert f"{sum(line.hours for line in table):.1f}" == "445.7" and "| together | | 445.7 |" in PAGE


@pytest.mark.parametrize("stage", ["quadruples", "images", "filter", "pack", "pairs", "lora", "cost"])
def test_every_stage_teaches(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        syncpr_main([stage, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and len(shown) > 800


def test_cost_follows_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert syncpr_main(["cost", "--quadruples", "1405", "--gpu-tflops", "100"]) == 0
    shown = capsys.readouterr().out
    assert "14,050 pictures x 425 Tflop / 100 Tflop per s" in shown
    assert "16.6 GPU-hours" in shown  # 14,050 x 4.25 s


def test_the_operations_of_a_picture_are_those_of_the_library() -> None:
    """FLUX.1-dev's transformer without its weights, on the shapes of one step."""
    import torch
    from diffusers import FluxTransformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    texts, patches = 512, (384 // 16) ** 2
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        FluxTransformer2DModel(guidance_embeds=True)(
            hidden_states=torch.empty(1, patches, 64),
            timestep=torch.empty(1),
            guidance=torch.empty(1),
            pooled_projections=torch.empty(1, 768),
            encoder_hidden_states=torch.empty(1, texts, 4096),
            txt_ids=torch.empty(texts, 3),
            img_ids=torch.empty(patches, 3),
        )
    step = counted.get_total_flops() / 1e12
    assert step == pytest.approx(14.9, abs=0.05)  # as the page says
    rest = build_parser().parse_args(["cost"]).picture_tflops - 28 * step
    assert 5 < rest < 10  # T5-XXL on 512 tokens: 4.7; the auto-encoder's decoder: 1.4; rounded
