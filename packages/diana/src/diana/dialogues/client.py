"""Ask an OpenAI-compatible chat server, and survive what such servers do: limits, errors, hangs, nonsense.

Nothing here knows of persons or dialogues. The key comes from the environment alone and appears in no message.
"""

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tbps_common.errors import InputError

KEY_VARIABLE = "OPENAI_API_KEY"
# What a local server is given: the client library insists on a key, the server does not look at it.
_NO_KEY = "none"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_RETRIED = frozenset((408, 409, 425, 429))
_SHOWN = 200

Message = dict[str, str]
Value = TypeVar("Value")


class ItemFailed(Exception):
    """One item could not be answered within its time or attempts; others may go on."""


@dataclass(frozen=True)
class ServerSettings:
    """Which server and model, and how long to wait.

    Attributes:
        model: name that the server knows.
        base_url: such as http://127.0.0.1:8000/v1; None: OPENAI_BASE_URL, or OpenAI's own.
        temperature: 0 takes the most probable words.
        seed: passed on to servers that have one.
        timeout: seconds that one request may take.
        deadline: seconds that one item may take, with all its requests, pauses and repetitions.
        attempts: requests for one answer.
        max_tokens: longest answer.
    """

    model: str
    base_url: str | None = None
    temperature: float = 0.0
    seed: int | None = 0
    timeout: float = 60.0
    deadline: float = 300.0
    attempts: int = 6
    max_tokens: int = 120


class Deadline:
    """The moment at which an item's time is over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, 0 when it is over."""
        return max(0.0, self._end - time.monotonic())


class ChatClient:
    """Thread-safe client of one server.

    Args:
        settings: server, model and patience.
        sleep: waits so many seconds (tests replace it).

    Raises:
        InputError: the address is no http(s) address, or OpenAI's own server is meant and no key is set.
    """

    def __init__(self, settings: ServerSettings, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.settings = settings
        self._sleep = sleep
        base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or None
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if base_url is not None:
            parts = urlsplit(base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise InputError(f"--base_url {base_url} is no http address: give one such as http://127.0.0.1:8000/v1")
        elif not self._key:
            raise InputError(
                f"no key: set the environment variable {KEY_VARIABLE}, or name a local server by --base_url"
            )
        self._where = base_url or "OpenAI's server"
        from openai import OpenAI

        # Repetitions are done here: the library bounds the time of one request, not that of an item.
        self._client = OpenAI(api_key=self._key or _NO_KEY, base_url=base_url, timeout=settings.timeout, max_retries=0)
        self._pause_lock = threading.Lock()
        self._not_before = 0.0

    def ask(
        self,
        messages: Sequence[Message],
        accept: Callable[[str], Value],
        *,
        deadline: Deadline | None = None,
    ) -> Value:
        """One answer of the model.

        Args:
            messages: the conversation, each with `role` and `content`.
            accept: turns the text into the value wanted; a ValueError of it rejects the text, and the model is asked
                again with the reason appended.
            deadline: of the item this request belongs to; by default one of its own.

        Raises:
            ItemFailed: time or attempts are used up.
            InputError: the server refuses key, model or request: no other request would fare better.
        """
        deadline = deadline or Deadline(self.settings.deadline)
        conversation = list(messages)
        reason = "no time was left"
        for attempt in range(self.settings.attempts):
            self._await_turn(deadline, reason)
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * random.uniform(0.75, 1.25)
            try:
                text = self._request(conversation, deadline)
                return accept(text)
            except _Again as again:
                reason = again.reason
                if again.after is not None:
                    self._hold_back(again.after)
                    pause = 0.0
            except ValueError as rejected:
                if isinstance(rejected, InputError):
                    raise
                reason = f"the answer was rejected: {rejected}"
                conversation = [*messages, {"role": "user", "content": f"That did not fit: {rejected}. Try again."}]
                pause = 0.0
            if attempt + 1 < self.settings.attempts:
                self._wait(pause, deadline, reason)
        raise ItemFailed(f"{self.settings.attempts} attempts failed; the last: {reason}")

    def _request(self, conversation: list[Message], deadline: Deadline) -> str:
        import openai

        options: dict[str, Any] = {} if self.settings.seed is None else {"seed": self.settings.seed}
        try:
            answer: Any = self._client.chat.completions.create(
                model=self.settings.model,
                messages=conversation,  # type: ignore[arg-type]
                temperature=self.settings.temperature,
                max_tokens=self.settings.max_tokens,
                timeout=max(0.05, min(self.settings.timeout, deadline.left)),
                **options,
            )
        except openai.APIStatusError as error:
            raise self._judge(error) from None
        except openai.APITimeoutError:
            raise _Again("no answer in time") from None
        except openai.APIConnectionError as error:
            raise _Again(f"no connection to {self._where} ({self._plain(error.__cause__ or error)})") from None
        except (openai.APIError, json.JSONDecodeError, TypeError, ValueError) as error:
            raise _Again(f"the server's answer cannot be read ({self._plain(error)})") from None
        try:
            text = answer.choices[0].message.content
        except (AttributeError, IndexError, TypeError, KeyError):
            raise _Again("the server's answer has another form than a chat completion") from None
        if not isinstance(text, str) or not text.strip():
            raise _Again("the server's answer is empty")
        return text.strip()

    def _judge(self, error: Any) -> Exception:
        """Worth another try, or not."""
        status = error.status_code
        said = f"status {status}: {self._plain(error)}"
        if status in _RETRIED or status >= 500:
            return _Again(said, _retry_after(error.response.headers))
        remedy = {
            401: f"check the key in {KEY_VARIABLE}",
            403: f"check the key in {KEY_VARIABLE}",
            404: "check --base_url and --model",
        }.get(status, "check --model and the server's log")
        return InputError(f"{self._where} refuses the request ({said}): {remedy}")

    def _plain(self, error: BaseException) -> str:
        """First line of a message, without the key (servers like to repeat it)."""
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:_SHOWN]
        return line.replace(self._key, "...") if self._key else line

    def _hold_back(self, seconds: float) -> None:
        """A limit of the server concerns all threads."""
        with self._pause_lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _await_turn(self, deadline: Deadline, reason: str) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            self._wait(left, deadline, reason)
        if not deadline.left:
            raise ItemFailed(f"its time is over; the last trouble: {reason}")

    def _wait(self, seconds: float, deadline: Deadline, reason: str) -> None:
        if seconds >= deadline.left:
            raise ItemFailed(f"its time is over before the next try ({seconds:.1f} s); the last trouble: {reason}")
        if seconds > 0:
            self._sleep(seconds)


class _Again(Exception):
    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.after = reason, after


def _retry_after(headers: Any) -> float | None:
    """Seconds asked for by `retry-after-ms` or `Retry-After` (a number, or a date)."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers["retry-after"])
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    except KeyError:
        return None
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(headers["retry-after"])
    except (ValueError, TypeError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
