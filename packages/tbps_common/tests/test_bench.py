"""The benchmark command: real processes on sizes that take a moment."""

import json
import subprocess
import sys

import pytest
import torch

from tbps_common.bench import __main__ as bench
from tbps_common.bench.compare import compare, render
from tbps_common.bench.methods import METHODS, bytes_per_query, fits, make_features
from tbps_common.bench.sizes import COMPARED, PRESETS, Sizes, chosen_sizes
from tbps_common.bench.timer import difference, linux_bytes, measure

TINY = {
    "tokens": Sizes(12, 50, 10, 16, (1, 3), "topk_mean"),
    "dot": Sizes(15, 40, 1, 16, (2, 5), "dot"),
    "attributes": Sizes(9, 30, 4, 8, (1, 2), "attr_avg"),
}


@pytest.mark.parametrize("reduce", ["topk_mean", "max", "mean", "logsumexp", "attr_avg", "attr_max", "attr_lsp_min"])
def test_methods_agree(reduce):
    kind = "attributes" if reduce.startswith("attr") else "tokens"
    sizes = Sizes(**{**vars(TINY[kind]), "reduce": reduce})
    features = make_features(sizes, torch.device("cpu"))
    expected = METHODS["ours"](features, sizes, "highest").metrics
    for name in ("naive", "broadcast"):
        if fits(name, sizes):
            found = METHODS[name](features, sizes, "highest")
            assert found == pytest.approx({metric: expected[metric] for metric in found}, abs=1e-3), name
    assert METHODS["gemm"](features, sizes, "highest") is None


def test_single_vectors_agree():
    features = make_features(TINY["dot"], torch.device("cpu"))
    expected = METHODS["ours"](features, TINY["dot"], "highest").metrics
    found = METHODS["naive"](features, TINY["dot"], "highest")
    assert found == pytest.approx({metric: expected[metric] for metric in found}, abs=1e-3)


@pytest.mark.parametrize("kind", TINY)
def test_features_are_the_same_in_every_process(kind):
    sizes = TINY[kind]
    one, other = (make_features(sizes, torch.device("cpu")) for _ in range(2))
    assert torch.equal(one.query, other.query) and torch.equal(one.gallery, other.gallery)
    assert one.gallery.shape[0] == len(one.g_pids) == sizes.gallery
    torch.testing.assert_close(one.gallery.norm(dim=-1), torch.ones(one.gallery.shape[:-1]))
    counts = torch.bincount(one.g_pids)
    assert counts.max() <= sizes.positives[1]
    assert set(one.q_pids.tolist()) <= set(one.g_pids.tolist())


def test_command_with_real_processes(monkeypatch, tmp_path, capsys):
    # Memory for 5 queries of the naive form, so that its scaling is seen.
    sizes = TINY["dot"]
    needed = bytes_per_query("naive", sizes)
    monkeypatch.setattr("tbps_common.bench.compare.free_memory", lambda device: int(5.5 * needed / 0.4))
    target = tmp_path / "new" / "bench.json"
    options = ["--queries", "15", "--gallery", "40", "--tokens", "1", "--dim", "16", "--positives", "2,5"]
    options += ["--threads", "1", "--repeats", "1", "--against", "naive,broadcast", "--json", str(target)]
    assert bench.main(options) == 0
    report, text = json.loads(target.read_text(encoding="utf-8")), capsys.readouterr().out
    assert set(report) >= {"preset", "sizes", "machine", "methods", "ratios"}
    assert report["sizes"] == {**vars(sizes), "positives": [2, 5]}
    assert report["machine"]["threads"] == 1 and report["machine"]["torch"]
    naive = report["methods"]["naive"]
    assert (naive["queries"], naive["scaled"], naive["agrees"]) == (5, True, True)
    ours = report["methods"]["ours"]
    assert (ours["queries"], ours["scaled"]) == (15, False)
    for entry in report["methods"].values():
        assert entry["wall_s"] > 0 and entry["cpu_s"] >= 0 and entry["peak_mb"] >= 0
    assert report["absent"]["broadcast"] == "cannot score reduce=dot"
    assert report["ratios"]["ours_over_gemm"] > 0 and report["ratios"]["naive_over_ours"] > 0
    assert "ours_peak_over_naive_peak" not in report["ratios"]  # of 5 queries only: not comparable
    assert text == render(report) + "\n"
    assert "naive: run on 5 of 15 queries, because all would take about" in text
    assert "product alone" in text


def test_an_absent_library_is_no_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("tbps_common.bench.compare.in_fresh_process", answer_without_process)
    report = compare("tiny", TINY["dot"], against=("torchmetrics", "faiss", "pml"), threads=1, repeats=1)
    assert report["absent"] == dict.fromkeys(("torchmetrics", "faiss", "pml"), "not installed")
    assert render(report).count("not installed") == 3


def test_a_broken_library_costs_only_its_own_figures(monkeypatch):
    def answer(method, *arguments):
        if method == "faiss":
            raise RuntimeError("The process that measures faiss ended with 1: ImportError")
        return answer_without_process(method, *arguments)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("tbps_common.bench.compare.in_fresh_process", answer)
    report = compare("tiny", TINY["dot"], against=("faiss", "pml"), threads=1, repeats=1)
    assert report["absent"] == {"faiss": "The process that measures faiss ended with 1: ImportError"}
    assert "pml" in report["methods"]


def answer_without_process(method, sizes, queries, *settings):
    run = {"queries": queries, "scaled": False}
    return {**run, "wall_s": 1.0, "cpu_s": 1.0, "peak_mb": 1.0, "threads": 1, "metrics": {}}


def test_every_name_of_the_command_line_is_a_method():
    assert {*COMPARED, "gemm", "ours"} == set(METHODS)


def test_the_timer_runs_forms_in_turns():
    turns = []

    def busy(name, size):
        turns.append(name)
        return sum(bytearray(size))

    costs = measure({"small": lambda: busy("small", 1000), "large": lambda: busy("large", 20 << 20)}, repeats=2)
    assert turns == ["small", "large"] * 3  # one of them to warm up
    assert costs["large"].seconds > costs["small"].seconds and costs["large"].milliseconds > 1
    assert costs["large"].seconds == costs["large"].cpu_s <= 1.5 * costs["large"].wall_s


@pytest.mark.skipif(
    not linux_bytes("/proc/self/status", "VmHWM"), reason="this system does not tell a process its peak"
)
def test_the_timer_sees_the_memory_of_each_form():
    # In a process of its own: where /proc/self/clear_refs cannot be written, the peak of earlier work stays.
    program = (
        "from tbps_common.bench.timer import measure\n"
        "forms = {'small': lambda: bytearray(1000), 'large': lambda: bytearray(400 << 20)}\n"
        "costs = measure(forms, repeats=1, warm_up=False)\n"
        "print(costs['small'].peak_mib, costs['large'].peak_mib)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    small, large = map(float, ended.stdout.split())
    assert small < 50 and 200 < large < 450


def test_difference_of_tensors_numbers_and_sequences():
    assert difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5
    assert difference([1.0, (torch.zeros(2), 3)], [1.25, (torch.ones(2), 3)]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_their_names_say(name):
    sizes = PRESETS[name]
    assert chosen_sizes(name, {}) == sizes
    assert (sizes.tokens == 1) == (sizes.reduce == "dot")


def test_sizes_can_be_changed():
    sizes = chosen_sizes("itcpr", {"queries": 512, "gallery": 6144, "tokens": None})
    assert (sizes.queries, sizes.gallery, sizes.tokens, sizes.reduce) == (512, 6144, 32, "topk_mean")
    assert chosen_sizes("itcpr", {"tokens": 1}).reduce == "dot"
    assert chosen_sizes("cuhk", {"tokens": 4}).reduce == "topk_mean"


def test_a_reduction_that_does_not_fit(capsys):
    assert bench.main(["--preset", "itcpr", "--reduce", "dot"]) == 2
    captured = capsys.readouterr()
    assert "--tokens 1" in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--queries", "0"], "--queries: must be at least 1"),
        (["--positives", "3,2"], "--positives: must be LO,HI"),
        (["--positives", "a,b"], "--positives: must be LO,HI"),
        (["--repeats", "0"], "--repeats: must be at least 1"),
        (["--threads", "-1"], "--threads: must be at least 1"),
        (["--against", "naive,guess"], "unknown method 'guess'"),
        (["--preset", "huge"], "--preset: invalid choice: 'huge'"),
    ],
)
def test_unusable_flags_end_in_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "usage:" in captured.err and words in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(capsys):
    assert bench.main(["--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err


def test_help_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tbps_common.bench", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--against" in done.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
