"""diana-build-dialogues: what it writes, and that faults and kills cost nothing that was finished."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diana.cli import build_dialogues_main
from diana.data import PROMPT_POOL, render_dialogue

IMAGES = 12


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """A caption file of 12 training and 2 test records."""
    records = [
        {
            "id": number // 2 + 1,
            "file_path": f"cam_a/{number:03d}.png",
            "captions": [f"Person {number} wears a red coat.", "A person."],
            "split": "train" if number < IMAGES else "test",
        }
        for number in range(IMAGES + 2)
    ]
    path = tmp_path / "reid_raw.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def flags(server: Any, captions: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--captions", str(captions), "--out", str(out), "--rounds", "3", "--base_url", server.base_url),
        *("--model", "fake", "--timeout", "1", "--deadline", "20", "--concurrency", "4", *more),
    ]


def test_dialogues_have_the_layout_of_chatpedes(server: Any, captions: Path, tmp_path: Path) -> None:
    server.delay = 0.02
    out = tmp_path / "train_reid.json"
    assert build_dialogues_main(flags(server, captions, out)) == 0
    records = json.loads(out.read_text(encoding="utf-8"))
    assert [record["file_path"] for record in records] == [f"cam_a/{number:03d}.png" for number in range(IMAGES)]
    for number, record in enumerate(records):
        assert record["id"] == number // 2 + 1
        assert len(record["chats"]) == 3
        assert record["chats"][0][0]["value"] in PROMPT_POOL
        assert f"Person {number} wears" in record["chats"][0][1]["value"]
        assert render_dialogue(record["chats"]).count("ASSISTANT: ") == 3
    assert len(server.requests) == IMAGES * 5
    assert 1 < server.most_at_once <= 4
    # Who asks sees no caption.
    asked = [body for body in server.requests if "interview" in body["messages"][0]["content"]]
    assert len(asked) == IMAGES * 2
    assert not any("Person" in body["messages"][0]["content"] for body in asked)
    before = out.read_bytes()
    assert build_dialogues_main(flags(server, captions, out)) == 0
    assert len(server.requests) == IMAGES * 5  # nothing is asked twice
    assert out.read_bytes() == before


def test_the_result_depends_on_neither_concurrency_nor_order(server: Any, captions: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    assert build_dialogues_main(flags(server, captions, one, "--concurrency", "1")) == 0
    assert build_dialogues_main(flags(server, captions, many, "--concurrency", "12")) == 0
    assert one.read_bytes() == many.read_bytes()


def test_a_fifth_of_faulty_answers_loses_and_repeats_nothing(server: Any, captions: Path, tmp_path: Path) -> None:
    draws = random.Random(0)
    faults = [500, (429, {"retry-after-ms": "30"}), "reset", "not json", "other form", "empty"]
    server.fault = lambda number, body: draws.choice(faults) if draws.random() < 0.2 else None
    out = tmp_path / "out.json"
    assert build_dialogues_main(flags(server, captions, out, "--attempts", "12")) == 0
    records = json.loads(out.read_text(encoding="utf-8"))
    assert [record["file_path"] for record in records] == [f"cam_a/{number:03d}.png" for number in range(IMAGES)]
    assert len(server.requests) < 1.6 * IMAGES * 5


def test_failed_images_are_listed_and_tried_again(
    server: Any, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "Person 3 wears"
    server.fault = lambda number, body: 500 if bad in body["messages"][0]["content"] else None
    out = tmp_path / "out.json"
    assert build_dialogues_main(flags(server, captions, out, "--attempts", "2")) == 1
    assert "1 of 12 images failed (cam_a/003.png: status 500: status 500; no retry is left)" in capsys.readouterr().err
    failures = tmp_path / "out.json.failures.json"
    assert list(json.loads(failures.read_text(encoding="utf-8"))) == ["cam_a/003.png"]
    assert len(json.loads(out.read_text(encoding="utf-8"))) == IMAGES - 1
    assert not list(tmp_path.glob("*.jsonl"))
    server.fault = lambda number, body: None
    done = len(server.requests)
    assert build_dialogues_main(flags(server, captions, out)) == 0
    assert len(server.requests) == done + 5
    assert len(json.loads(out.read_text(encoding="utf-8"))) == IMAGES
    assert not failures.exists()


def test_a_repeated_question_is_asked_for_again(server: Any, captions: Path, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> str:
        if "interview" not in body["messages"][0]["content"]:
            return server.default_reply(body)
        fixed = any("asked already" in message["content"] for message in body["messages"])
        return "What of the shoes?" if fixed else "What of the hair?"

    server.reply = reply
    out = tmp_path / "out.json"
    assert build_dialogues_main(flags(server, captions, out, "--limit", "2")) == 0
    for record in json.loads(out.read_text(encoding="utf-8")):
        assert [turn[0]["value"] for turn in record["chats"][1:]] == ["What of the hair?", "What of the shoes?"]


@pytest.mark.slow
def test_killed_runs_go_on_without_loss(server: Any, captions: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments until a run gets through: every image once, finished images never asked for again."""

    server.delay = 0.05
    out = tmp_path / "out.json"
    arguments = flags(server, captions, out, "--concurrency", "2")
    program = f"import sys; from diana.cli import build_dialogues_main as main; sys.exit(main({arguments!r}))"
    journal = tmp_path / "out.json.journal"
    moments = random.Random(1)
    kills = 0
    for _ in range(40):
        child = subprocess.Popen([sys.executable, "-c", program], env=dict(os.environ), stderr=subprocess.DEVNULL)
        before = len(server.requests)
        while child.poll() is None and len(server.requests) == before:
            time.sleep(0.01)
        finished_before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        deadline = time.monotonic() + moments.uniform(0.1, 0.7)
        while child.poll() is None and (kills >= 5 or time.monotonic() < deadline):
            time.sleep(0.01)
        if child.poll() is None:
            child.kill()
            kills += 1
        child.wait()
        assert journal.read_bytes().count(b"\n") >= finished_before
        if child.returncode == 0:
            break
    assert kills >= 4
    records = json.loads(out.read_text(encoding="utf-8"))
    assert [record["file_path"] for record in records] == [f"cam_a/{number:03d}.png" for number in range(IMAGES)]
    openings = Counter(
        body["messages"][0]["content"]
        for body in server.requests
        if "Give a first short answer" in body["messages"][0]["content"]
    )
    # Only what was in work when a run was killed (two images at a time) is begun again.
    assert sum(openings.values()) <= IMAGES + 2 * kills


def test_a_torn_last_line_is_dropped_and_other_settings_are_refused(
    server: Any, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert build_dialogues_main(flags(server, captions, out)) == 0
    journal = tmp_path / "out.json.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    asked, before = len(server.requests), out.read_bytes()
    assert build_dialogues_main(flags(server, captions, out)) == 0
    assert len(server.requests) == asked + 5
    assert out.read_bytes() == before
    assert build_dialogues_main(flags(server, captions, out, "--rounds", "4")) == 2
    assert "begun with rounds=3, and this run has rounds=4" in capsys.readouterr().err
    journal.write_bytes(b"nonsense\n" + whole)
    assert build_dialogues_main(flags(server, captions, out)) == 0
    assert "1 lines cannot be read" in capsys.readouterr().out and journal.read_bytes().startswith(b"nonsense\n")
    assert out.read_bytes() == before and len(server.requests) == asked + 5


def test_a_corrected_input_leaves_nothing_stale(server: Any, captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert build_dialogues_main(flags(server, captions, out)) == 0
    asked = len(server.requests)
    records = json.loads(captions.read_text(encoding="utf-8"))
    records[3]["id"] = 77
    records[5]["captions"] = ["Person 55 wears a green coat."]
    captions.write_text(json.dumps(records), encoding="utf-8")
    assert build_dialogues_main(flags(server, captions, out)) == 0
    assert len(server.requests) == asked + 5  # only what the other dialogue was made from has changed
    written = json.loads(out.read_text(encoding="utf-8"))
    assert len(written) == IMAGES and written[3]["id"] == 77
    assert "Person 55 wears" in written[5]["chats"][0][1]["value"]


def test_dialogues_of_earlier_versions_are_kept(server: Any, captions: Path, tmp_path: Path) -> None:
    """Their journal does not say what they were made from."""
    out, journal = tmp_path / "out.json", tmp_path / "out.json.journal"
    assert build_dialogues_main(flags(server, captions, out)) == 0
    asked, before = len(server.requests), out.read_bytes()
    records = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    old = [{"id": 1, "file_path": record["file_path"], "chats": record["chats"]} for record in records]
    journal.write_text("".join(json.dumps(record) + "\n" for record in old), encoding="utf-8")
    assert build_dialogues_main(flags(server, captions, out)) == 0
    assert len(server.requests) == asked and out.read_bytes() == before


def test_a_refusal_ends_the_run_and_keeps_what_is_finished(
    server: Any, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda number, body: 401 if number > 22 else None
    out = tmp_path / "out.json"
    assert build_dialogues_main(flags(server, captions, out, "--concurrency", "1")) == 2
    assert "check the environment variable OPENAI_API_KEY" in capsys.readouterr().err
    assert not out.exists()
    assert (tmp_path / "out.json.journal").read_bytes().count(b"\n") == 4
    server.fault = lambda number, body: None
    asked = len(server.requests)
    assert build_dialogues_main(flags(server, captions, out)) == 0
    assert len(server.requests) == asked + (IMAGES - 4) * 5


def test_ctrl_c_keeps_what_is_finished_and_goes_on(server: Any, captions: Path, tmp_path: Path) -> None:
    server.delay = 0.05
    out = tmp_path / "out.json"
    arguments = flags(server, captions, out, "--concurrency", "2")
    program = f"import sys; from diana.cli import build_dialogues_main as main; sys.exit(main({arguments!r}))"
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while len(server.requests) < 14 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1].decode()
    assert child.returncode == 130 and "to continue with the missing images" in said and "Traceback" not in said
    kept = (tmp_path / "out.json.journal").read_bytes().count(b"\n")
    assert 1 <= kept < IMAGES and not out.exists()
    asked = len(server.requests)
    assert build_dialogues_main(arguments) == 0
    assert len(server.requests) == asked + (IMAGES - kept) * 5


def test_the_key_is_sent_and_never_told(
    server: Any, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = "sk-canary-1234567890"
    monkeypatch.setenv("OTHER_KEY", canary)
    server.fault = lambda number, body: 401 if number > 22 else None
    out = tmp_path / "out.json"
    assert build_dialogues_main(flags(server, captions, out, "--api_key_env", "OTHER_KEY")) == 2
    sent = {name.lower(): value for name, value in server.headers[0].items()}
    assert sent["authorization"] == f"Bearer {canary}"
    shown = "".join(capsys.readouterr())
    assert "OTHER_KEY" in shown
    assert canary not in shown + "".join(path.read_text() for path in tmp_path.iterdir())


def test_without_a_server_of_its_own_a_key_is_needed(
    server: Any, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_dialogues_main(["--captions", str(captions), "--out", str(tmp_path / "o.json"), "--model", "m"]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [captions]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no record of the split"),
        ("{", "line 1"),
        ('[{"id": 1, "file_path": "a.png", "captions": []}]', "has no caption"),
        ('[{"id": 1, "file_path": "a.png"}]', "captions"),
        ('[{"id": 1, "file_path": "a.png", "captions": ["x"]}, {"id": 1, "file_path": "a.png", "captions": ["x"]}]', "repeats"),
    ],
)  # fmt: skip
def test_bad_captions_are_named(
    content: str, message: str, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content, encoding="utf-8")
    assert build_dialogues_main(flags(server, path, tmp_path / "out.json")) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(path) in said
    assert not (tmp_path / "out.json").exists()
    assert not server.requests
