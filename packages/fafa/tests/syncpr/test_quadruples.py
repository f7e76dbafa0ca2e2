"""fafa-syncpr quadruples: what is asked, which answers count, and what a kill or a bad server costs."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fafa.cli import syncpr_main
from fafa.syncpr.prompts import (
    QUADRUPLE_KEYS,
    QUESTION_KEYS,
    caption_key,
    image_prompt,
    quadruple_messages,
    read_quadruples,
    read_verdict,
)
from fafa.syncpr.records import load_quadruples
from fafa.syncpr.seeds import read_seed_lists
from tbps_common.errors import DatasetError
from tbps_common.pipeline import Rejected
from tbps_world.practice.faults import FaultyServer
from tbps_world.practice.server import PracticeServer
from tbps_world.practice.syncpr import answer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(Path(f"{path}.manifest.json").read_text(encoding="utf-8"))


def good(number: int = 0) -> dict[str, str]:
    return {
        "caption_1": f"A tall man number {number} with short hair wears a red coat and blue jeans.",
        "caption_2": f"A tall man number {number} with short hair wears a black coat and blue jeans.",
        "edit_1_to_2": "Now wearing a black coat.",
        "edit_2_to_1": "Now wearing a red coat.",
    }


def test_draws_depend_on_seed_and_number_alone() -> None:
    lists = read_seed_lists()
    drawn = [lists.draw(0, number) for number in range(200)]
    assert [read_seed_lists().draw(0, number) for number in (199, 3)] == [drawn[199], drawn[3]]
    assert lists.draw(1, 3) != drawn[3]
    for one in drawn:
        assert 1 <= len(one["picture_2"]) <= 3
        assert all(value != one["picture_1"][name] for name, value in one["picture_2"].items())
    # Every value of every list turns up: the diversity that the paper names comes from here.
    for part, lists_of_part in (("person", lists.person), ("picture_1", lists.picture)):
        for name, values in lists_of_part.items():
            assert {one[part][name] for one in drawn} == set(values), name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not a JSON object"),
        ('{"person": {"age": ["old"]}}', "'picture' is missing"),
        ('{"person": {"age": []}, "picture": {"upper": ["a", "b"]}, "changes": ["upper"]}', "person.age"),
        ('{"person": {"age": ["a"]}, "picture": {"upper": ["a", "a"]}, "changes": ["upper"]}', "two different values"),
        ('{"person": {"age": ["a"]}, "picture": {"upper": ["a", "b"]}, "changes": ["shoes"]}', "'shoes'"),
        ('{"person": {"age": ["a\\n"]}, "picture": {"upper": ["a", "b"]}, "changes": ["upper"]}', "one line"),
        ("{", "line 1"),
    ],
)
def test_bad_seed_lists_are_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "lists.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=re.escape(said)) as refused:
        read_seed_lists(str(path))
    assert "lists.json" in str(refused.value)


def test_answers_are_found_in_fences_and_sentences() -> None:
    array = json.dumps([good(0), good(1)])
    for text in (array, f"```json\n{array}\n```", f"Here are [2] people:\n{array}\nDone.", f'{{"people": {array}}}'):
        assert read_quadruples(text, 2) == [good(0), good(1)]
    assert read_quadruples(json.dumps(good(0)), 1) == [good(0)]


def test_unusable_quadruples_are_told_apart() -> None:
    bad = [
        {**good(1), "caption_2": good(1)["caption_1"].upper()},
        {**good(2), "edit_1_to_2": 3},
        {**good(3), "caption_1": "Short."},
        {**good(4), "caption_2": "A tall woman number four with short hair wears a black coat."},
        {**good(5), "edit_2_to_1": "Now <b>wearing</b> a coat."},
        "text",
    ]
    results = read_quadruples(json.dumps([good(0), *bad]), 9)
    assert results[0] == good(0)
    assert [result["reason"] for result in results[1:]] == [
        "two of the four texts are the same",
        "not an object with the four texts",
        "a text is too short or too long",
        "the captions disagree about the gender",
        "a text holds markup or control characters",
        "not an object with the four texts",
        "missing from the answer",
        "missing from the answer",
    ]


@pytest.mark.parametrize(
    "text", ["", "no", "[]", "[1, 2]", "{", "[" * 100_000, '[{"caption_1": NaN}]', json.dumps([{}])]
)
def test_answers_without_any_quadruple_are_rejected(text: str) -> None:
    with pytest.raises(Rejected):
        read_quadruples(text, 2)


def test_verdicts() -> None:
    verdict = dict.fromkeys(QUESTION_KEYS, True) | {"same_person": False}
    assert read_verdict(f"```{json.dumps(verdict)}```") == verdict
    for text in ("yes", "{}", json.dumps(verdict | {"same_person": "yes"})):
        with pytest.raises(Rejected):
            read_verdict(text)


def test_prompts_take_captions_as_they_are() -> None:
    prompt = image_prompt("L {caption_1} R {caption_2}.", "a {caption_2} {x}", "b {caption_1}")
    assert prompt == "L a {caption_2} {x} R b {caption_1}."
    messages = quadruple_messages([read_seed_lists().draw(0, number) for number in range(3)])
    assert "3 people" in messages[0]["content"] and messages[0]["content"].count('{"person"') == 3


def test_the_practice_server_answers_what_the_stage_accepts() -> None:
    lists = read_seed_lists()
    for first in range(0, 60, 5):
        texts = answer(quadruple_messages([lists.draw(7, first + place) for place in range(5)]))
        assert not [result for result in read_quadruples(texts, 5) if "reason" in result]


def test_stage_writes_quadruples_and_says_what_it_cost(
    tmp_path: Path, server: PracticeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["quadruples", "--out", str(tmp_path), "--count", "12", "--per-request", "5", "--model", "any"]
    assert syncpr_main(flags) == 0
    records = lines(tmp_path / "quadruples.jsonl")
    assert [record["id"] for record in records] == list(range(15))  # whole requests
    assert all(set(record) == {"id", *QUADRUPLE_KEYS} for record in records)
    written = manifest(tmp_path / "quadruples.jsonl")
    assert written["finished"] and written["kept"] == 15 and written["settings"]["model"] == "any"
    assert written["server"] == server.url
    assert "3 requests answered" in capsys.readouterr().out
    before = server.answers
    assert syncpr_main(flags) == 0 and server.answers == before  # nothing is asked twice
    assert syncpr_main([*flags, "--count", "16"]) == 0 and server.answers == before + 1
    for path in tmp_path.rglob("*"):
        assert "canary-key" not in path.read_text(encoding="utf-8")


def test_shards_ask_for_the_same_people_as_one_machine(tmp_path: Path, server: PracticeServer) -> None:
    common = ["--count", "10", "--per-request", "2"]
    assert syncpr_main(["quadruples", "--out", str(tmp_path / "one"), *common]) == 0
    for shard in ("1/2", "2/2"):
        assert syncpr_main(["quadruples", "--out", str(tmp_path / "two"), *common, "--shard", shard]) == 0
    one, two = load_quadruples(tmp_path / "one"), load_quadruples(tmp_path / "two")
    # 5 quadruples are 3 requests of 2 for each shard, so the shards have two people more.
    assert {of: two[0][of] for of in one[0]} == one[0] and len(two[0]) == 12


def test_duplicates_are_dropped_counted_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    asked: list[int] = []

    def forgetful(messages: list[dict[str, Any]]) -> str:
        asked.append(len(asked))
        return json.dumps([good(len(asked) // 2), good(100 + len(asked))])  # every second answer repeats the first text

    with PracticeServer(forgetful) as server:
        flags = ["--base-url", server.url, "--count", "6", "--per-request", "2", "--workers", "1"]
        assert syncpr_main(["quadruples", "--out", str(tmp_path), *flags]) == 0
    kept = lines(tmp_path / "quadruples.jsonl")
    dropped = lines(tmp_path / "quadruples.jsonl.dropped.jsonl")
    assert len(kept) >= 6 and {entry["reason"] for entry in dropped} == {"duplicate caption"}
    assert len(kept) + len(dropped) == 2 * len(asked)
    keys = Counter(caption_key(record[name]) for record in kept for name in ("caption_1", "caption_2"))
    assert max(keys.values()) == 1
    assert manifest(tmp_path / "quadruples.jsonl")["dropped"] == {"duplicate caption": len(dropped)}


def test_duplicates_across_shards_are_left_out_by_the_reader(tmp_path: Path) -> None:
    for shard, ids in (("1-of-2", (0, 2)), ("2-of-2", (1, 3))):
        content = "".join(json.dumps({"id": of, **good(of // 3)}) + "\n" for of in ids)
        (tmp_path / f"quadruples.{shard}.jsonl").write_text(content, encoding="utf-8")
    kept, duplicates = load_quadruples(tmp_path)
    assert (list(kept), duplicates) == ([0, 3], 2)


def test_a_faulty_server_costs_time_but_no_quadruple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setattr("tbps_common.pipeline.client._FIRST_PAUSE", 0.01)
    with FaultyServer(answer, share=0.3, hang=1.3, retry_after="0.01", seed=3) as server:
        flags = ["--base-url", server.url, "--count", "120", "--per-request", "1", "--timeout", "1", "--tries", "9"]
        assert syncpr_main(["quadruples", "--out", str(tmp_path), *flags]) == 0
        assert len(server.met) >= 5
    assert [record["id"] for record in lines(tmp_path / "quadruples.jsonl")] == list(range(120))


def test_a_model_that_answers_nonsense_ends_with_the_number_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    with PracticeServer(lambda messages: "I would rather not.") as server:
        flags = ["--base-url", server.url, "--count", "2", "--per-request", "2", "--tries", "2"]
        assert syncpr_main(["quadruples", "--out", str(tmp_path), *flags]) == 1
    shown = capsys.readouterr().err
    assert "2 quadruples are missing" in shown and "--count" not in shown  # there are none to go on with
    assert not manifest(tmp_path / "quadruples.jsonl")["finished"]
    assert syncpr_main(["images", "--out", str(tmp_path), "--model", str(tmp_path)]) == 2


@pytest.mark.parametrize("line", ['{"a": 1}', '{"request": [0]}', "[]"])
def test_a_foreign_line_among_the_answers_is_named(
    tmp_path: Path, server: PracticeServer, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["quadruples", "--out", str(tmp_path), "--count", "2", "--per-request", "1"]
    assert syncpr_main(flags) == 0
    with open(tmp_path / "requests.jsonl", "a", encoding="utf-8") as journal:
        journal.write(line + "\n")
    assert syncpr_main(flags) == 2
    assert "requests.jsonl, line 1, is not an answer of this command" in capsys.readouterr().err


def test_a_second_run_asks_on_where_the_first_gave_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    asked: list[int] = []

    def sloppy(messages: list[dict[str, Any]]) -> str:
        asked.append(len(asked))
        return json.dumps([good(len(asked)), *[{}] * 9])  # one of ten can be used

    with PracticeServer(sloppy) as server:
        flags = ["quadruples", "--out", str(tmp_path), "--base-url", server.url, "--count", "8", "--per-request", "10"]
        assert syncpr_main([*flags, "--workers", "1"]) == 1
        given_up = len(asked)
        assert f"{8 - given_up} quadruples are missing" in capsys.readouterr().err and 0 < given_up < 8
        assert syncpr_main([*flags, "--workers", "1"]) == 0
    assert len(lines(tmp_path / "quadruples.jsonl")) == 8 == len(asked)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--count", "0"], "at least 1"),
        (["--shard", "3/2"], "3/2"),
        (["--temperature", "hot"], "number"),
        (["--base-url", "nowhere"], "--base_url"),
        (["--attributes", "absent.json"], "absent.json"),
    ],
)
def test_bad_flags(
    tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    out = tmp_path / "out"
    try:
        status = syncpr_main(["quadruples", "--out", str(out), *flags])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and said in capsys.readouterr().err and not out.exists()


def test_other_settings_and_a_missing_key_are_refused(
    tmp_path: Path, server: PracticeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["quadruples", "--out", str(tmp_path), "--count", "2", "--per-request", "2"]
    assert syncpr_main(flags) == 0
    assert syncpr_main([*flags, "--seed", "1"]) == 2
    assert "seed=0" in capsys.readouterr().err
    assert syncpr_main([*flags, "--no-resume"]) == 2
    assert "--no-resume" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert syncpr_main([*flags, "--api-key-env", "OPENAI_API_KEY"]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_dry_run_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert syncpr_main(["quadruples", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "nothing was sent" in capsys.readouterr().out and not (tmp_path / "out").exists()
