"""annotate.py against servers on the loopback address: the README's command, faults, kills, resume, bad input."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dp_gen.annotate import accept, build_prompt, main, reject_response, select_rows
from tbps_world.practice.faults import FaultyServer
from tbps_world.practice.server import PracticeServer

PACKAGE = Path(__file__).resolve().parents[1]
CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def caption(messages: list[dict[str, Any]]) -> str:
    """An answer that tells which prompt it belongs to, long enough to be accepted."""
    sentence = messages[-1]["content"].partition("Sentence: ")[2].partition("\n")[0]
    return f"Rewritten for the test: {sentence}"


def write_rows(path: Path, count: int) -> list[dict[str, Any]]:
    rows = [
        {
            "id": 100 + n,
            "base_description": f"Person {n} wears a red coat & 'old' shoes.",
            "reference_attribute_list": ["a skirt"],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    with FaultyServer(caption, share=0.0) as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        yield running


def test_the_readme_command_annotates_every_row(server: FaultyServer, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "edits.jsonl", 7)
    readme = (
        'python annotate.py --origin_path {DATA_PATH} --output_path {ANNOTATION_JSONL_PATH} --model "gpt-3.5-turbo" '
        "--TEXT_START 0 --TEXT_END -1 --SLICE_STEP 500"
    )
    values = {"DATA_PATH": str(tmp_path / "edits.jsonl"), "ANNOTATION_JSONL_PATH": str(tmp_path / "new" / "out.jsonl")}
    command = [sys.executable, *shlex.split(readme.format(**values))[1:]]
    result = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "7 of 7 rows" in result.stdout and "rows 0 to 499: 7 done" in result.stdout
    assert lines(tmp_path / "new" / "out.jsonl") == [
        {
            **row,
            "index": n,
            "instruction": build_prompt(row),
            "output": f"Rewritten for the test: {row['base_description']}",
            "model": "gpt-3.5-turbo",
        }
        for n, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    "n, start, end, expected",
    [
        (10, 0, -1, range(0, 10)),
        (10, 3, -1, range(3, 10)),
        (10, 3, 7, range(3, 7)),
        (10, 0, 99, range(0, 10)),
        (10, 12, -1, range(0)),
        (10, 7, 3, range(0)),
        (0, 0, -1, range(0)),
        (499, 0, -1, range(0, 499)),
    ],
)
def test_selection_keeps_the_last_row(n: int, start: int, end: int, expected: range) -> None:
    assert list(select_rows(n, start, end)) == list(expected)


@pytest.mark.parametrize(
    "reply, rejected",
    [
        ("x" * 29, True),
        ("x" * 30, False),
        ("  " + "x" * 29 + "\n ", True),
        ("A woman who looks Sorry about her wet white skirt.", True),
        ("抱歉，我不能改写这个句子。" * 5, True),
        ("Modify the sentence: a woman wears a white skirt.", True),
        ("She can modify the sentence, and wears a white skirt.", False),
        ("Here is the Rewritten Prompt: a woman in a white skirt.", True),
        ("Please REPLACE a commonly used requirement in the text.", True),
        ("It is the list of attributes that you gave: gold hair, a white skirt.", True),
        ("A lady with gold hair is dressed in a white skirt. Keep everything else.", True),
        ("A lady with gold hair is dressed in a white skirt, complemented by sandals.", False),
        ("A man promptly walks by: he keeps a bag in his hand, and puts on a cap.", False),
    ],
)
def test_rejection_looks_at_the_reply(reply: str, rejected: bool) -> None:
    assert reject_response(reply) is rejected


@pytest.mark.parametrize("reply", ["{}", ' "{}"\n', "Rewritten sentence: {}", "“{}”"])
def test_only_the_caption_of_a_reply_is_kept(reply: str) -> None:
    caption = "A lady with gold hair wears a white skirt."
    assert accept(reply.format(caption)) == caption


def test_the_prompt_is_plain_text_and_braces_are_characters() -> None:
    row = {
        "base_description": 'It\'s {attributes} & "<b>" {description}.',
        "reference_attribute_list": ["a {description}", "b"],
    }
    prompt = build_prompt(row)
    assert row["base_description"] in prompt and "a {description}, b" in prompt
    assert build_prompt({**row, "reference_attribute_list": "one phrase"}).count("one phrase") == 1


def test_range_and_slices(server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "in.jsonl", 11)
    command = ["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "out.jsonl")]
    assert main([*command, "--TEXT_START", "2", "--TEXT_END", "9", "--SLICE_STEP", "3"]) == 0
    assert [row["index"] for row in lines(tmp_path / "out.jsonl")] == list(range(2, 9))
    shown = capsys.readouterr().out
    assert all(f"rows {first} to {first + 2}:" in shown for first in (2, 5, 8))
    assert main([*command, "--SLICE_STEP", "3"]) == 0
    assert [row["index"] for row in lines(tmp_path / "out.jsonl")] == list(range(11))
    assert server.requests == 11 and "4 done" not in shown


def test_legacy_rows_count_by_their_prompt(server: FaultyServer, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", 3)
    legacy = {"instruction": build_prompt(rows[1]), "output": {"choices": [{"message": {"content": "old answer"}}]}}
    (tmp_path / "out.jsonl").write_text(json.dumps(legacy) + "\n__import__('os').abort()\n", encoding="utf-8")
    assert main(["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "out.jsonl")]) == 0
    kept, *written = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert kept == "__import__('os').abort()" and server.requests == 2
    assert [json.loads(line).get("index") for line in written] == [0, None, 2]


def test_rejected_rows_are_kept_aside_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "in.jsonl", 3)
    command = ["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "out.jsonl")]
    stubborn = FaultyServer(
        lambda messages: "Sorry, I cannot." if "Person 1 " in messages[-1]["content"] else caption(messages), share=0.0
    )
    with stubborn:
        assert main([*command, "--base_url", stubborn.url]) == 1
    assert stubborn.requests == 5  # three tries for the rejected row
    (aside,) = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert aside["index"] == 1 and aside["reply"] == "Sorry, I cannot." and "shorter than 30" in aside["reason"]
    assert "1 rejected" in capsys.readouterr().out
    with FaultyServer(caption, share=0.0) as willing:
        assert main([*command, "--base_url", willing.url]) == 0
    assert willing.requests == 1 and not (tmp_path / "out.jsonl.rejected.jsonl").exists()
    assert [row["index"] for row in lines(tmp_path / "out.jsonl")] == [0, 1, 2]


BAD_LINES = [
    b'{"base_description": "cut',
    b"[1, 2]",
    b'{"base_description": 3, "reference_attribute_list": ["a"]}',
    b'{"base_description": "A man.", "reference_attribute_list": []}',
    b'{"base_description": "A man."}',
    b'{"base_description": "A man.", "reference_attribute_list": ["\\ud800"]}',
    b'{"base_description": "A man.", "reference_attribute_list": ["a"], "x": NaN}',
    b'{"base_description": "\xff", "reference_attribute_list": ["a"]}',
    b"[" * 100_000,
]


def test_unusable_lines_are_named_and_the_others_done(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = b'{"base_description": "A man in red.", "reference_attribute_list": "a coat"}'
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, b"", *BAD_LINES, good]) + b"\n")
    status = main(["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "out.jsonl")])
    shown = capsys.readouterr()
    assert status == 1 and "Traceback" not in shown.err
    for number in range(3, 3 + len(BAD_LINES)):
        assert f"in.jsonl:{number}: " in shown.err
    assert [row["index"] for row in lines(tmp_path / "out.jsonl")] == [0, 2 + len(BAD_LINES)]


@pytest.mark.parametrize(
    "content, flags, said",
    [
        (None, [], "does not exist"),
        ("{}".encode("utf-16"), [], "UTF-16"),
        (b"{}\n", ["--concurrency", "0"], "--concurrency"),
        (b"{}\n", ["--base_url", "localhost"], "--base_url"),
        (b"{}\n", ["--api_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (b"{}\n", ["--timeout", "nan"], "--timeout"),
    ],
)
def test_bad_input_is_one_line(
    content: bytes | None, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    command = ["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "out.jsonl"), *flags]
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_output_must_not_be_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "in.jsonl", 1)
    before = (tmp_path / "in.jsonl").read_bytes()
    assert main(["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "in.jsonl")]) == 2
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_a_wrong_key_stops_the_run_and_is_never_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tbps_world.practice.server import ChatHandler

    class Refusing(ChatHandler):
        def respond(self, request: dict[str, Any], messages: Any) -> None:
            with self.practice.lock:
                self.practice.answers += 1
            self.send_json(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})

    write_rows(tmp_path / "in.jsonl", 50)
    with PracticeServer(caption, handler=Refusing) as refusing:
        command = ["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "out.jsonl")]
        assert main([*command, "--base_url", refusing.url, "--concurrency", "2"]) == 2
    shown = capfd.readouterr()
    assert refusing.answers <= 2 and "OPENAI_API_KEY" in shown.err
    assert CANARY not in shown.out + shown.err + "".join(p.read_text() for p in tmp_path.iterdir())


def test_dry_run_sends_nothing_and_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    rows = write_rows(tmp_path / "in.jsonl", 2)
    command = ["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "out.jsonl"), "--dry_run"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(build_prompt(row) in shown for row in rows) and not (tmp_path / "out.jsonl").exists()


def test_no_rows_is_no_failure(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n", encoding="utf-8")
    assert main(["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "a" / "out.jsonl")]) == 0
    assert (tmp_path / "a" / "out.jsonl").read_bytes() == b""


def run_with_kills(tmp_path: Path, rows: int, kills: int, latency: float, kill_after: tuple[float, float]) -> None:
    """Annotate against a faulty server, killed `kills` times in the middle; check that nothing is lost or repeated."""
    write_rows(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out.jsonl"
    draw = random.Random(rows)
    everything = ""
    with FaultyServer(caption, share=0.2, latency=latency, hang=3.0, retry_after="0.3", seed=7) as server:
        command = [
            sys.executable,
            "annotate.py",
            "--origin_path",
            str(tmp_path / "in.jsonl"),
            "--output_path",
            str(output),
        ]
        command += ["--model", "tiny", "--base_url", server.url, "--timeout", "2", "--max_retries", "8"]

        def start() -> subprocess.Popen[str]:
            return subprocess.Popen(command, cwd=PACKAGE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        killed = 0
        while killed < kills:
            before = server.requests
            process = start()
            while server.requests == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(*kill_after))
            process.send_signal(signal.SIGKILL)
            everything += process.communicate()[0]
            assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {everything}"
            killed += 1
            for line in output.read_bytes().split(b"\n")[:-1]:
                json.loads(line)
        started, requests, hangs = time.perf_counter(), server.requests, server.met["hang"]
        for _ in range(3):  # a row whose three answers were all bad is asked by the next run
            process = start()
            everything += process.communicate(timeout=300)[0]
            if process.returncode == 0:
                break
            assert process.returncode == 1 and " 0 failed" in everything.splitlines()[-1], everything
        seconds = time.perf_counter() - started
    written = lines(output)
    assert [row["index"] for row in written] == list(range(rows))
    assert all(row["output"].endswith(row["base_description"]) for row in written)
    in_flight = 8
    assert server.requests <= rows + server.met.total() + kills * in_flight
    assert len(server.met) == 7 and CANARY not in everything + output.read_text(encoding="utf-8")
    # What the requests of the last run need if no place is ever empty; a hanging one holds its place to the time limit.
    ideal = ((server.requests - requests) * latency + (server.met["hang"] - hangs) * 2) / in_flight
    print(everything)
    print(
        f"{rows} rows, {server.requests} requests, faults {dict(server.met)}, last run {seconds:.1f} s, ideal {ideal:.1f} s"
    )


def test_a_kill_loses_and_repeats_nothing(tmp_path: Path) -> None:
    run_with_kills(tmp_path, rows=150, kills=1, latency=0.02, kill_after=(0.1, 0.3))


@pytest.mark.slow
def test_a_thousand_rows_with_faults_and_five_kills(tmp_path: Path) -> None:
    run_with_kills(tmp_path, rows=1000, kills=5, latency=0.05, kill_after=(0.2, 0.9))


def test_sigterm_saves_what_is_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 2000)
    with FaultyServer(caption, share=0.0, latency=0.05) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "dp_gen.annotate", "--origin_path", str(tmp_path / "in.jsonl")]
            + ["--output_path", str(tmp_path / "out.jsonl"), "--base_url", server.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while server.requests < 20 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=60)[0]
    assert process.returncode == 143, shown
    assert 10 <= len(lines(tmp_path / "out.jsonl")) == server.requests < 2000
    assert "to continue with the missing rows" in shown and "Traceback" not in shown


def test_the_practice_server_rewrites_by_the_rule(tmp_path: Path) -> None:
    from tbps_world.practice.captions import answer

    rows = [
        {
            "base_description": "A lady with long black hair is dressed in a red skirt and a black shirt.",
            "reference_attribute_list": ["gold hair", "white skirt", "a brown bag"],
        },
        {"base_description": "He wears blue jeans, and walks.", "reference_attribute_list": "green shorts"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with PracticeServer(answer) as server:
        flags = ["--origin_path", str(tmp_path / "in.jsonl"), "--output_path", str(tmp_path / "out.jsonl")]
        assert main([*flags, "--base_url", server.url]) == 0
    assert [row["output"] for row in lines(tmp_path / "out.jsonl")] == [
        "A lady with gold hair is dressed in a white skirt and a black shirt, with a brown bag.",
        "He wears green shorts, and walks.",
    ]
