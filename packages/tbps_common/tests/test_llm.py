"""The chat client and the runner against servers on the loopback address: faults, kills, stops, secrets."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tbps_common.errors import InputError
from tbps_common.pipeline import (
    ChatClient,
    Conversation,
    Outcome,
    Rejected,
    RequestFailed,
    ServerRefusal,
    ask_once,
    in_conversations,
    run_stage,
)
from tbps_world.practice.faults import FaultyServer
from tbps_world.practice.server import ChatHandler, PracticeServer

pytest.importorskip("openai")

CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def echo(messages: list[dict[str, Any]]) -> str:
    return f"answer to {messages[-1]['content']}"


def ask(
    count: int,
    client: ChatClient,
    output: Path,
    parse: Any = None,
    question: str = "question {id}",
    converse: Any = None,
    **settings: Any,
) -> Outcome:
    """Asks about items 0..count-1; the record of an item holds its number and the answer."""

    async def one_question(item: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
        messages = [{"role": "user", "content": question.format(**item)}]
        judge = parse or (lambda number, answer: {"id": number, "answer": answer})
        return await conversation.ask(messages, lambda answer: judge(item["id"], answer))

    work = in_conversations(client, converse or one_question, **settings)
    return run_stage([{"id": number} for number in range(count)], work, output, key=lambda record: record.get("id"))


def client(url: str, **settings: Any) -> ChatClient:
    return ChatClient("tiny", base_url=url, **{"concurrency": 8, "timeout": 2.0, **settings})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@pytest.fixture
def steady() -> Iterator[FaultyServer]:
    with FaultyServer(echo, share=0.0) as server:
        yield server


def test_every_item_once_and_in_order_despite_mixed_faults(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    with FaultyServer(echo, share=0.2, hang=2.5, retry_after="0.1", seed=3) as server:
        outcome = ask(200, client(server.url, timeout=2), output, tries=5)
    assert outcome.exit_status == 0 and outcome.done == 200
    assert lines(output) == [{"id": n, "answer": f"answer to question {n}"} for n in range(200)]
    assert len(server.met) == 7 and server.requests == 200 + server.met.total()
    assert server.most_at_once <= 8 + server.met["hang"]  # the server notices late that a hanging request was dropped
    assert not list(output.parent.glob("out.jsonl.*"))


def test_requests_in_flight_reach_the_limit_and_stay_in_it(tmp_path: Path) -> None:
    with FaultyServer(echo, share=0.0, latency=0.05) as server:
        ask(40, client(server.url, concurrency=5), tmp_path / "out.jsonl")
    assert server.most_at_once == 5


def test_a_second_run_asks_for_the_rest_only_and_mends_a_torn_line(
    steady: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    stored = [{"id": 3, "answer": "kept"}, {"id": 1, "answer": "kept"}]
    torn = '{"id": 2, "answer": "half'
    output.write_text("".join(json.dumps(record) + "\n" for record in stored) + torn, encoding="utf-8")
    outcome = ask(5, client(steady.url), output)
    assert (outcome.before, outcome.done, steady.requests) == (2, 3, 3)
    assert [record["id"] for record in lines(output)] == [0, 1, 2, 3, 4]
    assert lines(output)[1]["answer"] == "kept" and "cut short" in capsys.readouterr().out
    outcome = ask(5, client(steady.url), output)
    assert outcome.before == 5 and outcome.exit_status == 0 and steady.requests == 3


def test_a_last_line_that_lacks_only_its_end_is_kept(steady: FaultyServer, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"id": 0, "answer": "kept"}', encoding="utf-8")
    assert ask(2, client(steady.url), output).before == 1
    assert [record["answer"] for record in lines(output)] == ["kept", "answer to question 1"]


def test_unreadable_lines_stay_at_the_top(
    steady: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    odd = b"__import__('os').abort()\n\xff\xfe\n[1, 2]\n"
    output.write_bytes(b'{"id": 1, "answer": "kept"}\n' + odd)
    ask(2, client(steady.url), output)
    assert "3 lines cannot be read" in capsys.readouterr().out
    assert output.read_bytes().startswith(odd)
    assert [json.loads(line)["id"] for line in output.read_bytes()[len(odd) :].splitlines()] == [0, 1]


def test_rejected_answers_are_asked_again_then_kept_aside(steady: FaultyServer, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def picky(item: int, answer: str) -> dict[str, Any]:
        if item == 2:
            raise Rejected("no number two")
        return {"id": item, "answer": answer}

    outcome = ask(4, client(steady.url), output, picky, tries=3)
    assert (outcome.done, outcome.rejected, outcome.exit_status) == (3, 1, 1)
    assert steady.asked["question 2"] == 3
    (entry,) = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert (entry["id"], entry["reason"], entry["reply"]) == (2, "no number two", "answer to question 2")
    assert ask(4, client(steady.url), output).exit_status == 0
    assert not (tmp_path / "out.jsonl.rejected.jsonl").exists()


def test_an_item_that_changes_from_rejected_to_failed_stands_in_one_side_file(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.failed.jsonl").write_text('{"id": 0, "reason": "old"}\n', encoding="utf-8")
    with FaultyServer(echo, share=1.0, faults=("empty",)) as server:
        ask(1, client(server.url), output)
    assert not (tmp_path / "out.jsonl.failed.jsonl").exists()
    assert [entry["reason"] for entry in lines(tmp_path / "out.jsonl.rejected.jsonl")] == ["the answer is empty"]


@pytest.mark.parametrize("fault", ["rate_limit", "server_error", "reset", "hang"])
def test_passing_failures_are_repeated_as_often_as_allowed(fault: str, tmp_path: Path) -> None:
    with FaultyServer(echo, share=1.0, faults=(fault,), hang=1.5, retry_after="0.05") as server:
        asker = client(server.url, max_retries=2, timeout=1)
        outcome = ask(1, asker, tmp_path / "out.jsonl")
    assert server.requests == 3 and asker.retries == 2 and outcome.failed == 1
    (entry,) = lines(tmp_path / "out.jsonl.failed.jsonl")
    assert entry["requests"] == 3 and "no retry is left" in entry["reason"]


@pytest.mark.parametrize("header", ["0.7", "date"])
def test_retry_after_is_obeyed(header: str, tmp_path: Path) -> None:
    from email.utils import formatdate

    value = formatdate(time.time() + 2, usegmt=True) if header == "date" else header

    class Once(FaultyServer):
        def choose(self, messages: Any) -> str | None:
            super().choose(messages)
            return "rate_limit" if self.requests == 1 else None

    with Once(echo, share=0.0, retry_after=value) as server:
        started = time.perf_counter()
        outcome = ask(1, client(server.url), tmp_path / "out.jsonl")
    assert outcome.done == 1 and time.perf_counter() - started > 0.65


def test_waits_are_understood_as_numbers_and_dates() -> None:
    from tbps_common.pipeline.client import seconds_to_wait

    assert seconds_to_wait({"retry-after": "1.5"}) == 1.5 and seconds_to_wait({"retry-after-ms": "250"}) == 0.25
    assert seconds_to_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert (seconds_to_wait({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}) or 0) > 1e6
    for nonsense in ({"retry-after": "soon"}, {"retry-after": "nan"}, {"retry-after": ""}, {}):
        assert seconds_to_wait(nonsense) is None


def test_a_server_that_keeps_saying_429_is_left_alone_by_everybody(tmp_path: Path) -> None:
    class Limited(FaultyServer):
        """Answers ten requests a second; after the tenth it says 429 until the second is over."""

        window, left = 0.0, 10

        def choose(self, messages: Any) -> str | None:
            super().choose(messages)
            with self.lock:
                if time.monotonic() - self.window > 1:
                    self.window, self.left = time.monotonic(), 10
                self.left -= 1
                return "rate_limit" if self.left < 0 else None

    with Limited(echo, share=0.0, retry_after="1.05") as server:
        outcome = ask(40, client(server.url, max_retries=3), tmp_path / "out.jsonl")
    assert outcome.done == 40
    assert server.requests <= 40 + 3 * 8  # in each pause, what was in flight when it began


def test_an_item_ends_at_its_deadline(tmp_path: Path) -> None:
    started = time.perf_counter()
    with FaultyServer(echo, share=1.0, faults=("rate_limit",), retry_after="30") as server:
        outcome = ask(1, client(server.url, deadline=3.0), tmp_path / "out.jsonl")
    assert outcome.failed == 1 and server.requests == 1 and time.perf_counter() - started < 10
    assert "leave no time" in lines(tmp_path / "out.jsonl.failed.jsonl")[0]["reason"]


class _Refusing(ChatHandler):
    """Refuses with the status in the question, quoting the key as careless servers do."""

    def respond(self, request: dict[str, Any], messages: Any) -> None:
        with self.practice.lock:
            self.practice.answers += 1
        status = int(messages[-1]["content"].split()[-1])
        self.send_json(status, {"error": {"message": f"refused {self.headers['Authorization']}", "code": "x"}})


@pytest.mark.parametrize("status, stops", [(401, True), (403, True), (404, True), (400, False), (422, False)])
def test_refusals_are_not_repeated_and_never_show_the_key(status: int, stops: bool, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with PracticeServer(echo, handler=_Refusing) as server:
        outcome = ask(3, client(server.url, concurrency=1), output, question=f"fail with {status}")
    assert server.answers == (1 if stops else 3)
    assert outcome.exit_status == (2 if stops else 1)
    written = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert CANARY not in written + str(outcome)
    if stops:
        assert outcome.refusal and ("OPENAI_API_KEY" in outcome.refusal or "--model" in outcome.refusal)
    else:
        assert f"status {status}" in written and "[key]" in written


def test_a_server_that_is_down_ends_the_run(tmp_path: Path) -> None:
    with PracticeServer(echo) as server:
        url = server.url
    outcome = ask(100, client(url, max_retries=0), tmp_path / "out.jsonl", give_up_after=5)
    assert outcome.exit_status == 2 and outcome.failed < 60
    assert outcome.refusal and "in a row got no answer" in outcome.refusal


def test_min_interval_spaces_the_requests(steady: FaultyServer, tmp_path: Path) -> None:
    started = time.perf_counter()
    ask(4, client(steady.url, min_interval=0.2), tmp_path / "out.jsonl")
    assert time.perf_counter() - started >= 0.6


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly(number: int, status: int, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with FaultyServer(echo, share=0.0, latency=0.05) as server:
        threading.Timer(0.6, os.kill, (os.getpid(), number)).start()
        outcome = ask(2000, client(server.url), output)
        assert outcome.exit_status == status and 0 < outcome.done < 2000
        assert [record["id"] for record in lines(output)] == sorted(record["id"] for record in lines(output))
        assert server.requests == outcome.done  # what was in flight was waited for


def test_a_signal_does_not_wait_for_a_hanging_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tbps_common.pipeline.chat._GRACE_SECONDS", 0.3)
    with FaultyServer(echo, share=1.0, faults=("hang",), hang=20.0) as server:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.perf_counter()
        outcome = ask(20, client(server.url, timeout=30.0), tmp_path / "out.jsonl")
    assert outcome.exit_status == 130 and time.perf_counter() - started < 8


def test_two_runs_cannot_write_the_same_file(steady: FaultyServer, tmp_path: Path) -> None:
    from tbps_common.pipeline import Journal

    with Journal(tmp_path / "out.jsonl"), pytest.raises(InputError, match="another run"):
        ask(1, client(steady.url), tmp_path / "out.jsonl")


def test_a_record_that_cannot_be_written_leaves_the_others_whole(steady: FaultyServer, tmp_path: Path) -> None:
    import resource

    output = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        with pytest.raises(OSError) as caught:
            ask(50, client(steady.url, concurrency=1), output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(output)
    assert 0 < len(lines(output)) < 50 and output.read_bytes().endswith(b"\n")
    assert ask(50, client(steady.url), output).exit_status == 0
    assert [record["id"] for record in lines(output)] == list(range(50))


@pytest.mark.parametrize(
    "value, said", [("", "holds no key"), ("  ", "holds no key"), (f"{CANARY} x", "spaces"), (f"{CANARY}é", "special")]
)
def test_a_missing_or_broken_key_is_said_without_showing_it(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(InputError, match=said) as caught:
        ChatClient("tiny", base_url="http://127.0.0.1:1/v1", api_key_env="SOME_KEY")
    assert "SOME_KEY" in str(caught.value) and CANARY not in str(caught.value)


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://x/v1", "http://", "http://x:99999/v1", "http://[::1"])
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    with pytest.raises(InputError, match="not the address of a server"):
        ChatClient("tiny", base_url=address)


def test_an_address_is_shown_without_its_password() -> None:
    shown = client("http://user:secret@127.0.0.1:9/v1?token=secret").server
    assert shown == "http://127.0.0.1:9/v1"


def test_a_cut_off_answer_is_asked_again(tmp_path: Path) -> None:
    class Cut(ChatHandler):
        def respond(self, request: dict[str, Any], messages: Any) -> None:
            self.send_answer(request, "half of a", finish_reason="length" if self.practice.answers < 1 else "stop")

    with PracticeServer(echo, handler=Cut) as server:
        outcome = ask(1, client(server.url), tmp_path / "out.jsonl")
    assert outcome.done == 1 and server.answers == 2


def test_a_conversation_goes_on_from_the_answers_before(tmp_path: Path) -> None:
    """Three questions per item, the third asked again with a remark until its answer fits; all or nothing is stored."""

    def answer(messages: list[dict[str, Any]]) -> str:
        said = messages[-1]["content"]
        return f"{said}!" if said.startswith(("again", "item")) else f"answer to {said}"

    def third(text: str) -> str:
        if not text.startswith("again"):
            raise Rejected("it does not begin with again", remark="again")
        return text

    async def converse(item: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
        first = await conversation.ask([{"role": "user", "content": f"item {item['id']}"}], str)
        second = await conversation.ask([{"role": "user", "content": first}], str)
        return {**item, "all": [first, second, await conversation.ask([{"role": "user", "content": "3"}], third)]}

    long = {"converse": converse, "tries": 6, "begun_per_place": 1}
    with FaultyServer(answer, share=0.2, hang=2.5, retry_after="0.05", seed=5) as server:
        outcome = ask(30, client(server.url, timeout=2), tmp_path / "out.jsonl", **long)
        assert outcome.done == 30 and server.requests == 30 * 4 + server.met.total()
        asked = server.requests
        assert ask(30, client(server.url), tmp_path / "out.jsonl", **long).before == 30 and server.requests == asked
    assert lines(tmp_path / "out.jsonl") == [
        {"id": n, "all": [f"item {n}!", f"item {n}!!", "again!"]} for n in range(30)
    ]


def test_a_conversation_that_breaks_off_is_kept_aside(tmp_path: Path) -> None:
    async def converse(item: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
        await conversation.ask([{"role": "user", "content": "good"}], str)
        return await conversation.ask([{"role": "user", "content": "bad"}], never)

    def never(text: str) -> dict[str, Any]:
        raise Rejected("nothing will do")

    with FaultyServer(echo, share=0.0) as server:
        outcome = ask(2, client(server.url), tmp_path / "out.jsonl", converse=converse, tries=2)
    assert outcome.rejected == 2 and outcome.exit_status == 1 and lines(tmp_path / "out.jsonl") == []
    (entry, _) = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert entry == {"id": 0, "reason": "nothing will do", "requests": 3, "reply": "answer to bad"}


def test_a_single_question(steady: FaultyServer) -> None:
    asker = client(steady.url)
    for _ in range(2):  # a client can be used again
        assert ask_once(asker, [{"role": "user", "content": "who?"}], str) == "answer to who?"

    def reject(text: str) -> str:
        raise Rejected("no")

    with pytest.raises(Rejected, match="no"):
        ask_once(asker, [{"role": "user", "content": "who?"}], reject, tries=2)
    assert steady.requests == 4


def test_a_server_of_ones_own_may_do_without_a_key(steady: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert ask_once(client(steady.url, key_optional=True), [{"role": "user", "content": "?"}], str) == "answer to ?"
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        ChatClient("tiny", key_optional=True)


class _Scripted(ChatHandler):
    """Sends what the test's function makes of the request: status, body, and perhaps the type of the content."""

    script: Any = None

    def respond(self, request: dict[str, Any], messages: Any) -> None:
        status, body, *kind = type(self).script(request)
        content = body if isinstance(body, str) else json.dumps(body)
        self.send_bytes(status, content.encode(), {"Content-Type": kind[0]} if kind else None)


def scripted(script: Any) -> PracticeServer:
    return PracticeServer(echo, handler=type("Handler", (_Scripted,), {"script": staticmethod(script)}))


def completion(content: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


QUESTION = [{"role": "user", "content": "who?"}]


@pytest.mark.parametrize(
    ("field", "status", "error"),
    [
        (
            "max_tokens",
            400,
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
        ),
        ("temperature", 400, "Unsupported value: 'temperature' does not support 0.5 with this model."),
        ("seed", 400, "Unrecognized request argument supplied: seed"),
        ("frequency_penalty", 422, [{"loc": ["body", "frequency_penalty"], "msg": "Extra inputs are not permitted"}]),
    ],
)
def test_a_field_that_the_server_does_not_know_is_left_out_from_then_on(
    field: str, status: int, error: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    def script(request: dict[str, Any]) -> tuple[int, Any]:
        seen.append(request)
        if field in request:
            return status, {"detail": error} if isinstance(error, list) else {"error": {"message": error}}
        return 200, completion("fine")

    sampling = {"max_tokens": 9, "temperature": 0.5, "seed": 3, "frequency_penalty": 0.1}
    with scripted(script) as server:
        asker = client(server.url, sampling=sampling, concurrency=1, max_retries=0)
        assert ask(3, asker, tmp_path / "out.jsonl").done == 3
    assert len(seen) == 4 and capsys.readouterr().err.count(f"does not take {field}") == 1
    assert seen[-1].get("max_completion_tokens") == (9 if field == "max_tokens" else None)
    assert set(sampling) - set(seen[-1]) == {field}


def test_fields_of_the_user_replace_and_remove(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    with scripted(lambda request: (seen.append(request), (200, completion("fine")))[1]) as server:
        fields = {"max_tokens": None, "max_completion_tokens": 2000, "temperature": 0.2}
        ask_once(client(server.url, sampling={"max_tokens": 5, "temperature": 1.0}, fields=fields), QUESTION, str)
    assert {name: seen[0].get(name) for name in fields} == fields and "max_tokens" not in seen[0]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, {"error": {"message": "the prompt is too long"}}, "the prompt is too long"),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "field required"}]}, "body.messages: field required"),
        (403, {"detail": "your plan lacks this model"}, "your plan lacks this model"),
        (404, {"detail": "Not Found"}, "Not Found"),
        (200, {"error": {"message": "the prompt is too long", "code": 400}}, "status 400: the prompt is too long"),
        (200, {"object": "error", "message": "no such model", "code": 404}, "no such model"),
    ],
)
def test_the_servers_own_words_are_shown(status: int, body: Any, words: str) -> None:
    with scripted(lambda request: (status, body)) as server, pytest.raises((RequestFailed, ServerRefusal), match=words):
        ask_once(client(server.url, max_retries=0), QUESTION, str)


def test_an_error_inside_a_success_is_tried_again_and_ends_the_run_when_it_stays(tmp_path: Path) -> None:
    sent = 0

    def script(request: dict[str, Any]) -> tuple[int, Any]:
        nonlocal sent
        sent += 1
        return 200, completion("fine") if sent == 2 else {"error": {"message": "slow down", "code": 429}}

    with scripted(script) as server:
        assert ask(1, client(server.url), tmp_path / "one.jsonl").done == 1 and sent == 2
        outcome = ask(90, client(server.url, max_retries=0), tmp_path / "many.jsonl", give_up_after=5)
    assert outcome.exit_status == 2 and outcome.failed < 60 and "slow down" in str(outcome.refusal)


def test_a_login_page_ends_the_run_at_once(tmp_path: Path) -> None:
    page = "<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
    with scripted(lambda request: (200, page, "text/html")) as server:
        outcome = ask(50, client(server.url, concurrency=1), tmp_path / "out.jsonl")
    assert outcome.exit_status == 2 and outcome.failed == 0 and "web page" in str(outcome.refusal)


def test_parts_of_a_message_are_joined_without_thoughts() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "a draft"}]},
        {"type": "text", "text": "A man "},
        {"type": "reasoning", "text": "hm"},
        {"type": "text", "text": "in red."},
    ]
    with scripted(lambda request: (200, completion(parts))) as server:
        assert ask_once(client(server.url), QUESTION, str) == "A man in red."


def test_reasoning_never_reaches_who_judges_the_answer(tmp_path: Path) -> None:
    with scripted(lambda request: (200, completion("<think>A draft.</think>\nSure! **A man.**<|im_end|>"))) as server:
        assert ask(1, client(server.url), tmp_path / "out.jsonl").done == 1
    assert lines(tmp_path / "out.jsonl") == [{"id": 0, "answer": "A man."}]
    with scripted(lambda request: (200, completion("<think>A draft, and another"))) as server:
        outcome = ask(1, client(server.url), tmp_path / "open.jsonl", tries=2)
    assert outcome.rejected == 1
    assert "no final part" in lines(tmp_path / "open.jsonl.rejected.jsonl")[0]["reason"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:1080"),
        ("HTTPS_PROXY", "http://proxy.example:99999"),
        ("http_proxy", "http://"),
        ("SSL_CERT_FILE", "/nowhere/certificates.pem"),
    ],
)
def test_a_proxy_or_certificate_that_cannot_work_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ServerRefusal, match=f"environment variable {name} "):
        ask_once(client("http://chat.invalid/v1", max_retries=0), QUESTION, str)


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(
    steady: FaultyServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask_once(client(steady.url), QUESTION, str) == "answer to who?"
    assert "http_proxy is not used" in capsys.readouterr().err


def test_no_items_are_a_success_without_a_request(steady: FaultyServer, tmp_path: Path) -> None:
    outcome = ask(0, client(steady.url), tmp_path / "out.jsonl")
    assert outcome.exit_status == 0 and steady.requests == 0
