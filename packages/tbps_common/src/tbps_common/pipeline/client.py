"""A chat model behind an OpenAI-compatible server: retries, deadlines and pacing around single requests."""

import argparse
import asyncio
import ipaddress
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

from tbps_common.errors import InputError

Message = dict[str, Any]

RETRIED_STATUS = (408, 409, 429)  # and every 5xx
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_POLL_SECONDS = 0.1
_SHOWN = 200
_NO_KEY = "none"  # the openai package insists on one
_SHORTEST_SECRET = 8  # local servers take any text as key; a shorter one may occur in ordinary words
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "https_proxy", "http_proxy")
_UNSUPPORTED = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|extra (?:input|field)|deprecated",
    re.IGNORECASE,
)
_WEB_PAGE = re.compile(r"\s*(?:<!doctype html|<html|<head|<body)", re.IGNORECASE)


class RequestFailed(Exception):
    """No answer for this item; the message is the reason, in one line and without the key."""


class BadReply(Exception):
    """The server answered, but with nothing that can be used; asking again may help."""


class ServerRefusal(InputError):
    """The server refuses every request of this run: the key, the model's name or the account is wrong."""


class Stopped(Exception):
    """`ChatClient.stopping` was set before this request began."""


class _Relearned(Exception):
    """The request had a field that the server does not know; without it, it is worth sending again at once."""


class _Passing(Exception):
    """A failure that the next try may not meet."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass
class ItemBudget:
    """What one item has cost, over all its questions.

    Attributes:
        requests: made so far.
        failures: of the requests of the present question, tried again since.
        expires: when its time is over, by `time.monotonic`; it begins with the first request.
    """

    requests: int = 0
    failures: int = 0
    expires: float | None = None


def request_fields(text: str) -> dict[str, Any]:
    """Type of an argparse flag: fields of the request as a JSON object, in which null leaves a field out."""
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a JSON object such as {{"max_tokens": null, "max_completion_tokens": 2000}}'
        )
    return fields


def require_api_key(variable: str) -> str:
    """The key out of the environment; it is never taken from a command line, where `ps` would show it.

    Raises:
        InputError: the variable is unset, empty, or holds what no HTTP header can carry (the message does not show it).
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable} holds no key: export {variable}=... (a local server takes any text), "
            "or name another variable with --api_key_env"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"the environment variable {variable} holds spaces or special characters: copy the key again")
    return key


class ChatClient:
    """Sends chat requests, at most `concurrency` at a time; use it as `async with`.

    Tried again, with growing pauses or after the server's `Retry-After`: statuses 408, 409, 429 and 5xx, broken
    connections, and requests without an answer after `timeout`. A pause holds no place: other items go on meanwhile, unless
    the server names a `Retry-After` twice without an answer between: then all wait, for the limit is the account's.

    Attributes:
        model: name sent to the server.
        concurrency: requests in flight, at most.
        retries: made so far, over all items.
        answers: received so far.
        stopping: set it to begin no further request; those in flight may finish.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 60.0,
        deadline: float = 600.0,
        max_retries: int = 6,
        min_interval: float = 0.0,
        sampling: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
        key_optional: bool = False,
    ) -> None:
        """Check what can be checked without a request.

        Args:
            model: name of the model.
            base_url: address up to and including `/v1`; None takes `OPENAI_BASE_URL`, or else OpenAI's own.
            api_key_env: environment variable that holds the key.
            concurrency: requests in flight, at most.
            timeout: seconds for one request.
            deadline: seconds for one item, over all its requests and pauses.
            max_retries: retries of one question, at most.
            min_interval: seconds between the starts of two requests, over all items.
            sampling: further fields of the request, such as `temperature` or `max_tokens`; None values are left out. One that
                the server says it does not know is left out from then on.
            fields: the same, given by the user: they replace those of `sampling`, or take them out.
            key_optional: a server with an address of its own may do without a key.

        Raises:
            InputError: the key is missing, or the address is not that of a server.
        """
        self.model = model
        self.concurrency = concurrency
        self.retries = 0
        self.answers = 0
        self.stopping = False
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL", "").strip() or None
        without = key_optional and self._base_url is not None and not os.environ.get(api_key_env, "").strip()
        self._key = _NO_KEY if without else require_api_key(api_key_env)
        self._key_variable = api_key_env
        if self._base_url is not None and not _is_address(self._base_url, ("http", "https")):
            raise InputError(
                "--base_url (or OPENAI_BASE_URL) is not the address of a server: give one such as http://localhost:8000/v1"
            )
        self._timeout, self._deadline, self._max_retries = timeout, deadline, max_retries
        self._min_interval, self._next_start = min_interval, 0.0
        self._waits_asked_for = 0
        given = {**(sampling or {}), **(fields or {})}
        self._fields = {name: value for name, value in given.items() if value is not None}
        self._openai: Any = None
        self._client: Any = None
        self._places: asyncio.Semaphore | None = None

    @property
    def server(self) -> str:
        """Address for messages: without user, password and query."""
        if self._base_url is None:
            return "the openai package's default server"
        parts = urlsplit(self._base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    async def __aenter__(self) -> "ChatClient":
        import openai

        self._openai = openai
        self.stopping = False  # what stopped an earlier run may have been put right
        direct = _is_on_this_machine(self._base_url)
        if not direct:
            _check_connection_variables()
        try:
            # Retrying is ours: the package's own retries know neither the item's deadline nor our stop.
            self._client = openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self._base_url,
                timeout=self._timeout,
                max_retries=0,
                http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if direct else None,
            )
        except Exception as error:  # whatever httpx makes of the environment's proxies and certificates
            names = [name for name in (*_PROXIES, "SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
            raise ServerRefusal(
                self._one_line(f"no connection can be set up ({type(error).__name__}: {error})")
                + (f": check the environment variables {', '.join(names)}" if names else "")
            ) from error
        self._places = asyncio.Semaphore(self.concurrency)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Message], budget: ItemBudget) -> str:
        """The text of the model's answer.

        Args:
            messages: `[{"role": "user", "content": ...}, ...]`.
            budget: of the item; several questions about it share one.

        Raises:
            RequestFailed: there is no answer, and the retries or the item's time are spent, or trying again is useless.
            BadReply: the answer is empty, cut off, or not in the form of a chat completion.
            ServerRefusal: no request of this run can succeed.
            Stopped: `stopping` is set.
        """
        assert self._places is not None, "use the client as `async with`"
        while True:
            async with self._places:
                await self._wait_for_turn()
                if self.stopping:
                    raise Stopped
                if budget.expires is None:
                    budget.expires = time.monotonic() + self._deadline
                remaining = budget.expires - time.monotonic()
                if remaining <= 0:
                    raise RequestFailed(f"no answer within the item's {self._deadline:g} s")
                budget.requests += 1
                try:
                    return await self._request(messages, min(self._timeout, remaining))
                except ServerRefusal:
                    self.stopping = True
                    raise
                except _Relearned:
                    continue
                except _Passing as problem:
                    passing = problem
            if budget.failures >= self._max_retries:
                raise RequestFailed(f"{passing}; no retry is left")
            pause = self._pause(budget.failures, passing.retry_after)
            if pause >= budget.expires - time.monotonic():
                raise RequestFailed(f"{passing}; the item's {self._deadline:g} s leave no time to try again")
            if passing.retry_after is not None:
                self._waits_asked_for += 1
                if self._waits_asked_for > 1:
                    self._next_start = max(self._next_start, time.monotonic() + passing.retry_after)
            budget.failures += 1
            self.retries += 1
            await asyncio.sleep(pause)

    def _pause(self, failures: int, retry_after: float | None) -> float:
        if retry_after is not None:
            return retry_after * (1 + 0.1 * random.random())  # not everybody at the same moment
        return min(_FIRST_PAUSE * 2**failures, _LONGEST_PAUSE) * (0.5 + 0.5 * random.random())

    async def _wait_for_turn(self) -> None:
        """Wait until a request may start, or `stopping` is set."""
        while (left := self._next_start - time.monotonic()) > 0 and not self.stopping:
            await asyncio.sleep(min(left, _POLL_SECONDS))
        self._next_start = max(self._next_start, time.monotonic() + self._min_interval)

    async def _request(self, messages: Sequence[Message], seconds: float) -> str:
        openai = self._openai
        fields = dict(self._fields)
        try:
            async with asyncio.timeout(seconds):
                completion = await self._client.chat.completions.create(
                    model=self.model, messages=list(messages), extra_body=fields
                )
        except TimeoutError:
            raise _Passing(f"no answer within {seconds:.3g} s") from None
        except openai.APIStatusError as error:
            body = error.body if error.body is not None else error.response.text
            raise self._judge(int(error.status_code), body, error.response.headers, fields) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise _Passing(self._one_line(f"the connection failed ({type(cause).__name__}: {cause})")) from None
        except (openai.APIResponseValidationError, ValueError) as error:
            raise BadReply(f"the server's answer is not a chat completion ({type(error).__name__})") from None
        except openai.OpenAIError as error:
            raise RequestFailed(self._one_line(f"{type(error).__name__}: {error}")) from None
        if isinstance(completion, str):
            if not _WEB_PAGE.match(completion):
                raise BadReply("the server's answer is not a chat completion (text)")
            what = f"{self.server} answers with a web page (a login, or a gateway), not with a chat completion"
            raise _Passing(what) if self.answers else ServerRefusal(f"{what}: check --base_url")
        failure = getattr(completion, "error", None)
        if failure or getattr(completion, "object", None) == "error":
            body = failure if failure else completion.model_dump()
            raise self._judge(_status_within(body), body, {}, fields)
        return self._text(completion)

    def _text(self, completion: Any) -> str:
        """The answer's text out of whatever the server sent: the package checks no field of it."""
        choices = getattr(completion, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        text = _joined(getattr(getattr(choice, "message", None), "content", None))
        if text is None:
            raise BadReply("the server's answer is not a chat completion (no text in choices[0].message.content)")
        if getattr(choice, "finish_reason", None) == "length":
            raise BadReply("the answer is cut off: it is longer than max_tokens")
        if getattr(choice, "finish_reason", None) == "content_filter":
            raise BadReply("the server's content filter cut the answer")
        if not text.strip():
            raise BadReply("the answer is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadReply("the answer holds half of a surrogate pair") from None
        if len(self._key) >= _SHORTEST_SECRET and self._key in text:
            raise BadReply("the answer repeats the API key")
        self.answers += 1
        self._waits_asked_for = 0
        return text

    def _judge(self, status: int, body: Any, headers: Mapping[str, str], fields: Mapping[str, Any]) -> Exception:
        """What a refused request means for the item and for the run."""
        reason = self._one_line(f"status {status}: {_said(body)}")
        details = body if isinstance(body, dict) else {}
        if status in (401, 403):
            return ServerRefusal(
                f"{self.server} refuses the key ({reason}): check the environment variable {self._key_variable}"
            )
        if status == 429 and "insufficient_quota" in (details.get("code"), details.get("type")):
            return ServerRefusal(
                f"{self.server} says that the account's quota is used up ({reason}): add to it, run again"
            )
        if status == 404 and self.answers == 0:
            return ServerRefusal(f"{self.server} has no such address or model ({reason}): check --base_url and --model")
        if status in RETRIED_STATUS or status >= 500:
            return _Passing(reason, seconds_to_wait(headers))
        if self._learn(json.dumps(body, default=str), details.get("param"), fields):
            return _Relearned()
        return RequestFailed(reason)

    def _learn(self, text: str, parameter: Any, fields: Mapping[str, Any]) -> bool:
        """Leave out, from now on, the field of the request that an error names; whether there is one."""
        if not _UNSUPPORTED.search(text):
            return False
        named = [name for name in fields if name == parameter]
        named = named or [name for name in fields if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
        if not named:
            return False
        name = named[0]
        if name in self._fields:  # otherwise another request has learnt it meanwhile
            value = self._fields.pop(name)
            renamed = name == "max_tokens" and "max_completion_tokens" in text
            if renamed:
                self._fields["max_completion_tokens"] = value
            instead = "is called max_completion_tokens here" if renamed else "is left out"
            print(f"note: {self.server} does not take {name}, which {instead} from now on", file=sys.stderr)
        return True

    def _one_line(self, text: str) -> str:
        """The server's words, short, and without the key or the parts of it that servers quote."""
        words = text.split()
        if len(self._key) >= _SHORTEST_SECRET:
            parts = (self._key[:6], self._key[-4:])
            words = ["[key]" if any(part in word for part in parts) else word for word in words]
        text = " ".join(words)
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _said(body: Any) -> str:
    """The server's own words in the body of an error: OpenAI's `message`, FastAPI's `detail`, or the text itself."""
    if isinstance(body, dict):
        for name in ("message", "detail", "error", "msg"):
            if body.get(name):
                return _said(body[name])
        return json.dumps(body, default=str, ensure_ascii=False)
    if isinstance(body, list):
        return "; ".join(
            f"{'.'.join(map(str, part['loc']))}: {_said(part)}"
            if isinstance(part, dict) and isinstance(part.get("loc"), list)
            else _said(part)
            for part in body
        )
    text = str(body)
    return re.sub(r"<[^>]*>", " ", text) if _WEB_PAGE.match(text) else text


def _status_within(body: Any) -> int:
    """The status that an error inside an answer with status 200 stands for."""
    code = body.get("code", body.get("status")) if isinstance(body, dict) else None
    if str(code).isdecimal() and 400 <= int(str(code)) < 600:
        return int(str(code))
    return 429 if "rate" in str(code) and "limit" in str(code) else 500


def _joined(content: Any) -> str | None:
    """The text of a message: a string, or the text parts of a list, without those that hold the model's thoughts."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") in ("text", "output_text"):
            texts.append(str(part.get("text") or ""))
    return "".join(texts)


def _is_on_this_machine(address: str | None) -> bool:
    """Whether no proxy leads to the server; a note says so where one is configured for all hosts."""
    host = urlsplit(address or "").hostname or ""
    try:
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            return False
    except ValueError:
        return False
    name = next((name for name in _PROXIES if os.environ.get(name, "").strip()), None)
    if name is not None and not proxy_bypass(host):
        print(f"note: the server is on this machine, so the proxy in {name} is not used", file=sys.stderr)
    return True


def _is_address(text: str, schemes: Sequence[str]) -> bool:
    """Whether a text is a URL of one of the schemes, with a host and a possible port."""
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number, or too large
        return False


def _check_connection_variables() -> None:
    """Refuse proxies and certificates in the environment that no connection can be made with.

    Raises:
        ServerRefusal: names the variable.
    """
    for name in _PROXIES:
        value = os.environ.get(name, "").strip()
        proxy = value if "://" in value else f"http://{value}"
        if value and not _is_address(proxy, ("http", "https", "socks5", "socks5h")):
            raise ServerRefusal(
                f"the environment variable {name} does not hold the address of a proxy: give one such as "
                "http://HOST:PORT or socks5://HOST:PORT, or unset it"
            )
    for name, is_there in (("SSL_CERT_FILE", Path.is_file), ("SSL_CERT_DIR", Path.is_dir)):
        value = os.environ.get(name, "").strip()
        if value and not is_there(Path(value)):
            raise ServerRefusal(
                f"the environment variable {name} names {value}, which does not exist: correct or unset it"
            )


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, given as milliseconds, seconds or a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if not math.isnan(seconds):
            return max(0.0, seconds)
    return None
