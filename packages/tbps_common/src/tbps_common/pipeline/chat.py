"""Items put to a chat model: conversations of one or more questions, many at a time, each answer judged and asked again."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import TypeVar

from tbps_common.pipeline.answers import Rejected, final_answer
from tbps_common.pipeline.client import BadReply, ChatClient, ItemBudget, Message, RequestFailed, ServerRefusal, Stopped
from tbps_common.pipeline.journal import Record
from tbps_common.pipeline.stages import Dropped, Results, Work

Value = TypeVar("Value")

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.1


class Conversation:
    """Questions about one item, one after the other; all of them together have the item's time.

    Attributes:
        last_answer: newest text of the model as it came, accepted or not; None before the first.
        requests: made so far.
    """

    def __init__(self, client: ChatClient, tries: int) -> None:
        self._client, self._tries, self._budget = client, tries, ItemBudget()
        self.last_answer: str | None = None

    @property
    def requests(self) -> int:
        return self._budget.requests

    async def ask(self, messages: Sequence[Message], accept: Callable[[str], Value]) -> Value:
        """One question.

        Args:
            messages: to the model.
            accept: what to make of the `final_answer`; raises `Rejected`, and the question is asked again.

        Raises:
            Rejected: so were the answers of all tries.
            BadReply: the last try had no answer in it.
            RequestFailed: there is no answer.
            ServerRefusal: no request of this run can succeed.
        """
        self._budget.failures = 0
        question = list(messages)
        tries = 0
        while True:
            tries += 1
            try:
                self.last_answer = await self._client.ask(question, self._budget)
                return accept(final_answer(self.last_answer))
            except (Rejected, BadReply) as problem:
                if tries >= self._tries:
                    raise
                if isinstance(problem, Rejected) and problem.remark is not None:
                    question = [*messages, {"role": "user", "content": problem.remark}]


Converse = Callable[[Record, Conversation], Awaitable[Record]]
"""Asks what there is to ask about an item, and returns the record to keep."""


def in_conversations(
    client: ChatClient, converse: Converse, *, tries: int = 3, give_up_after: int = 20, begun_per_place: int = 4
) -> Work:
    """The work of `run_stage` that a chat model does.

    Items without a usable answer are `rejected`, those without any answer `failed`; the next run asks for both again. A
    stop ends the handing out of items and leaves those in flight a few seconds to finish.

    Args:
        client: not yet entered.
        converse: an item and its conversation -> the record; it may let the errors of `Conversation.ask` through.
        tries: how often one question is asked, at most, while its answers are rejected.
        give_up_after: stop when so many items in a row got no answer: the server is down, or refuses them all.
        begun_per_place: items begun but not finished, per request in flight: while one waits out a pause, others use its
            place. What is begun is lost by a kill, so 1 where conversations are long.

    The work raises:
        ServerRefusal: no request can succeed, or `give_up_after` is reached; what was in flight has been finished.
    """

    def work(items: Sequence[Record], stop: Callable[[], bool]) -> Results:
        if not items:
            return
        left = iter(items)
        running: dict[asyncio.Task[Record | Dropped], Record] = {}
        leave_at: float | None = None
        refusal: ServerRefusal | None = None
        failures_in_a_row = 0
        with asyncio.Runner() as runner:
            runner.run(client.__aenter__())
            try:
                while leave_at is None or time.monotonic() < leave_at:
                    client.stopping = client.stopping or stop()
                    if not client.stopping:
                        for item in islice(left, client.concurrency * begun_per_place - len(running)):
                            running[runner.get_loop().create_task(_settle(item, client, converse, tries))] = item
                    elif leave_at is None:
                        leave_at = time.monotonic() + _GRACE_SECONDS
                    if not running:
                        break
                    finished = runner.run(_first_of(running))
                    for task in finished:
                        item = running.pop(task)
                        try:
                            result = task.result()
                        except Stopped:
                            continue
                        except ServerRefusal as error:  # the client begins no further request
                            refusal = error
                            continue
                        yield item, result
                        failed = isinstance(result, Dropped) and result.kind == "failed"
                        failures_in_a_row = failures_in_a_row + 1 if failed else 0
                        if isinstance(result, Dropped) and failures_in_a_row >= give_up_after and not client.stopping:
                            client.stopping = True
                            refusal = ServerRefusal(
                                f"{failures_in_a_row} items in a row got no answer from {client.server} (last: "
                                f"{result.reason}): see to the server, then run the same command again"
                            )
            finally:
                runner.run(_cancelled(running))
                runner.run(client.__aexit__())
        if refusal is not None:
            raise refusal

    return work


def ask_once(
    client: ChatClient, messages: Sequence[Message], accept: Callable[[str], Value], *, tries: int = 3
) -> Value:
    """One question outside of a stage, waited for.

    Args:
        client: not yet entered; it may be used again.
        messages: to the model.
        accept: what to make of the `final_answer`; raises `Rejected`.
        tries: how often it is asked, at most, while its answers are rejected.

    Raises:
        Rejected: so were the answers of all tries.
        BadReply: the last try had no answer in it.
        RequestFailed: there is no answer.
        ServerRefusal: no request to this server can succeed.
    """

    async def once() -> Value:
        async with client:
            return await Conversation(client, tries).ask(messages, accept)

    return asyncio.run(once())


async def _settle(item: Record, client: ChatClient, converse: Converse, tries: int) -> Record | Dropped:
    conversation = Conversation(client, tries)
    try:
        return await converse(item, conversation)
    except RequestFailed as problem:
        return Dropped(str(problem), {"requests": conversation.requests}, "failed")
    except (Rejected, BadReply) as problem:
        reply = {} if conversation.last_answer is None else {"reply": conversation.last_answer}
        return Dropped(str(problem), {"requests": conversation.requests, **reply}, "rejected")


async def _first_of(running: dict[asyncio.Task[Record | Dropped], Record]) -> set[asyncio.Task[Record | Dropped]]:
    """The tasks that are finished; waits a moment for the first."""
    finished, _ = await asyncio.wait(running, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    return finished


async def _cancelled(running: dict[asyncio.Task[Record | Dropped], Record]) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
