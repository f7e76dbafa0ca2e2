"""The benchmark compares like with like, and says so when it does not."""

import json
from pathlib import Path

import pytest
import torch

import bench_diana as bench


def test_the_command_compares_equal_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        flags = ["--batch_size", "2", "--gallery", "5", "--repeats", "1", "--json", str(tmp_path / "bench.json")]
        assert bench.main(flags) == 0
    finally:
        torch.set_num_threads(threads)
    rows = {row["what"]: row for row in json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]}
    loss = rows["loss of the step (sdpa)"]
    assert loss["ours"] == pytest.approx(loss["direct"], rel=1e-3)
    assert rows["tokens of the batch"]["ours"] < rows["tokens of the batch"]["direct"] == 800
    assert sum(name.startswith("attribute similarity") for name in rows) == 5
    assert "dialogues after 1 to 5 rounds (sdpa), ms" in capsys.readouterr().out


def test_a_difference_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "broadcast_similarity", lambda a, b, *_: torch.zeros(len(a), len(b)))
    assert bench.main(["--batch_size", "2", "--gallery", "3"]) == 1
    assert "The two forms of avg differ" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--batch_size", "1"], ["--repeats", "0"], ["--device", "tpu"]])
def test_unusable_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(flags)
    assert ended.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_the_full_sizes_are_the_papers() -> None:
    """Parameters counted on the meta device: 1,341,619,449 at K = 16 (Llama's embedding included)."""
    from diana import DiaNAConfig
    from diana.model.refiner import AttributeRefiner
    from diana.model.towers import build_llama, build_vision

    config: DiaNAConfig = bench.bench_config(full_size=True)
    with torch.device("meta"):
        towers = build_vision(config.vision_config), build_llama(config.llama_config)
        refiner = AttributeRefiner(768, 16, 2)
    counts = [sum(value.numel() for value in module.parameters()) for module in (*towers, refiner)]
    assert counts == [86_893_816, 1_235_814_400, 16_550_400]
    projections = 768 * (1024 + 1) + 768 * (2048 + 1)
    assert sum(counts) + projections + 1 == 1_341_619_449
