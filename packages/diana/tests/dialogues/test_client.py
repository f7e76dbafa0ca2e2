"""The client against a server with faults: what is tried again, what is not, and how long it takes."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from diana.dialogues.client import ChatClient, Deadline, ItemFailed, ServerSettings
from tbps_common.errors import InputError

HELLO = [{"role": "user", "content": "hello"}]
ClientFor = Callable[..., ChatClient]


@pytest.fixture
def client_for(server: Any) -> ClientFor:
    """`client_for(attempts=..., ...)`: a client of the fake server."""

    def make(**settings: Any) -> ChatClient:
        values = {"timeout": 5.0, "deadline": 20.0, "attempts": 4, **settings}
        return ChatClient(ServerSettings(model="fake", base_url=server.base_url, **values))

    return make


@pytest.mark.parametrize("fault", [500, 503, 408, "reset", "not json", "other form", "empty"])
def test_passing_faults_are_tried_again(fault: Any, server: Any, client_for: ClientFor) -> None:
    server.fault = lambda number, body: fault if number < 2 else None
    server.reply = lambda body: " fine "
    assert client_for().ask(HELLO, str) == "fine"
    assert len(server.requests) == 3


def test_a_hang_ends_with_the_time_of_the_request(server: Any, client_for: ClientFor) -> None:
    server.fault = lambda number, body: "hang" if number == 0 else None
    server.reply = lambda body: "fine"
    started = time.monotonic()
    assert client_for(timeout=0.4).ask(HELLO, str) == "fine"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("header", ["Retry-After", "retry-after-ms"])
def test_the_wait_a_limit_asks_for_is_kept_by_all_threads(header: str, server: Any, client_for: ClientFor) -> None:
    value = "1" if header == "Retry-After" else "1000"
    server.fault = lambda number, body: (429, {header: value}) if number == 0 else None
    server.reply = lambda body: "fine"
    client = client_for()
    assert client.ask(HELLO, str) == "fine"
    assert server.times[1] - server.times[0] >= 1.0
    client._hold_back(0.5)  # as another thread's answer would
    before = time.monotonic()
    client.ask(HELLO, str)
    assert time.monotonic() - before >= 0.5


def test_a_date_is_understood_as_a_wait() -> None:
    from diana.dialogues.client import _retry_after

    assert _retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    later = _retry_after({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"})
    assert later is not None and later > 1e6
    for nonsense in ("soon", "nan", "-3", ""):
        assert _retry_after({"retry-after": nonsense}) is None
    assert _retry_after({}) is None


def test_a_wait_longer_than_the_item_may_take_fails_it_at_once(server: Any, client_for: ClientFor) -> None:
    server.fault = lambda number, body: (429, {"Retry-After": "600"})
    started = time.monotonic()
    with pytest.raises(ItemFailed, match="status 429"):
        client_for(deadline=5.0).ask(HELLO, str)
    assert time.monotonic() - started < 5
    assert len(server.requests) == 1


def test_attempts_are_bounded_and_the_last_trouble_is_told(server: Any, client_for: ClientFor) -> None:
    server.fault = lambda number, body: 500
    with pytest.raises(ItemFailed, match="3 attempts failed; the last: status 500"):
        client_for(attempts=3).ask(HELLO, str)
    assert len(server.requests) == 3


def test_the_deadline_bounds_all_attempts(server: Any, client_for: ClientFor) -> None:
    server.fault = lambda number, body: "hang"
    started = time.monotonic()
    with pytest.raises(ItemFailed, match="time is over"):
        client_for(timeout=0.3, attempts=100).ask(HELLO, str, deadline=Deadline(1.5))
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(("status", "remedy"), [(401, "check the key"), (404, "--model"), (400, "--model")])
def test_refusals_are_not_tried_again(status: int, remedy: str, server: Any, client_for: ClientFor) -> None:
    server.fault = lambda number, body: status
    with pytest.raises(InputError, match=remedy):
        client_for().ask(HELLO, str)
    assert len(server.requests) == 1


def test_a_rejected_answer_is_asked_for_again_with_the_reason(server: Any, client_for: ClientFor) -> None:
    answers = iter(["seven words too many", "short"])
    server.reply = lambda body: next(answers)

    def accept(text: str) -> str:
        if len(text) > 5:
            raise ValueError("it is too long")
        return text

    assert client_for().ask(HELLO, accept) == "short"
    assert "it is too long" in server.requests[1]["messages"][-1]["content"]
    assert server.requests[1]["messages"][:-1] == HELLO


def test_the_key_is_sent_and_never_told(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = "sk-canary-1234567890"
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    client = ChatClient(ServerSettings(model="fake", base_url=server.base_url, attempts=1))
    server.fault = lambda number, body: 401
    with pytest.raises(InputError) as error:
        client.ask(HELLO, str)
    sent = {name.lower(): value for name, value in server.headers[0].items()}
    assert sent["authorization"] == f"Bearer {canary}"
    assert client._plain(ValueError(f"Incorrect API key: {canary}")) == "Incorrect API key: ..."
    assert canary not in str(error.value) + repr(client.settings) + "".join(capsys.readouterr())


def test_what_cannot_be_a_server_is_refused(server: Any) -> None:
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        ChatClient(ServerSettings(model="m"))
    for address in ("ftp://x/v1", "127.0.0.1:80", "http://"):
        with pytest.raises(InputError, match="no http address"):
            ChatClient(ServerSettings(model="m", base_url=address))


def test_a_server_that_is_not_there_fails_the_item(server: Any) -> None:
    client = ChatClient(ServerSettings(model="m", base_url="http://127.0.0.1:9/v1", attempts=2, deadline=10))
    with pytest.raises(ItemFailed, match="no connection to http://127.0.0.1:9/v1"):
        client.ask(HELLO, str)
