"""`claims-toy`: intervals, verdicts, and going on where it was stopped."""

import json
import math
from pathlib import Path

import pytest

from tbps_world.cli import claims_toy_main
from tbps_world.toys import claims
from tbps_world.toys.claims import PAPERS, difference, table, verdict


def test_interval_is_students() -> None:
    mean, low, high = difference([1.0, 2.0, 3.0])  # deviation 1, three seeds
    assert (mean, high - mean, mean - low) == pytest.approx((2.0, 4.303 / math.sqrt(3), 4.303 / math.sqrt(3)))
    assert difference([2.0]) == (2.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("ends", "said"), [((0.1, 2), "holds"), ((-1, 2), "no difference seen"), ((-2, -0.1), "opposite")]
)
def test_verdict(ends: tuple[float, float], said: str) -> None:
    assert verdict(*ends) == said


def test_every_claim_is_about_figures_of_its_papers_arms() -> None:
    for paper in PAPERS.values():
        arms = {arm.name for arm in paper.arms}
        assert {name.partition(": ")[0] for claim in paper.claims for name in (claim.better, claim.worse)} == arms


def test_table_of_two_seeds() -> None:
    arms = {"with refiner": {"round 1": 30.0, "round 5": 50.0}, "without refiner": {"round 1": 30.0, "round 5": 49.0}}
    better = {"with refiner": {"round 1": 32.0, "round 5": 52.5}, "without refiner": {"round 1": 31.0, "round 5": 53.0}}
    page = table(PAPERS["diana"], {"0": arms, "1": better, "2": {}}, "claims-toy")
    assert "2 seed(s)" in page and "| with refiner | round 5 | 51.2 | 50.0 to 52.5 |" in page
    assert "| five rounds beat one | +20.2 | +17.1 to +23.4 | holds |" in page
    assert "| the refiner helps after five rounds | +0.2 | -9.3 to +9.8 | no difference seen |" in page


def test_figures_that_are_there_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(paper: str, out: Path, arguments: list[str]) -> dict[str, float]:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(arguments)
        return {"similarity": 40.0 + len(ran), "re-ranked": 50.0, "minutes": 1.0}

    monkeypatch.setattr(claims, "run_arm", run)
    flags = ["--paper", "mra", "--seeds", "2", "--claims", str(tmp_path)]
    assert claims_toy_main(flags) == 130
    assert [list(arms) for arms in json.loads((tmp_path / "mra.json").read_text()).values()] == [
        ["pre-trained", "without regions", "not pre-trained"]
    ]
    assert ["--no_regions" in arguments for arguments in ran] == [False, True, False]
    ran.clear()
    assert claims_toy_main([*flags, "--seeds", "1"]) == 0 and not ran
    assert "1 seed(s)" in (tmp_path / "mra.md").read_text()
    assert claims_toy_main(flags) == 0
    assert len(ran) == 3 and all(arguments[:2] == ["--seed", "1"] for arguments in ran)
