"""Many items through a chat model: each answer kept as soon as it is there, a second run asks for the rest only."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from tbps_common.pipeline.client import BadReply, ChatClient, Message, RequestFailed, ServerRefusal, Stopped
from tbps_common.pipeline.journal import Journal, Record
from tbps_common.run.progress import Progress

Item = TypeVar("Item")
Value = TypeVar("Value")
Fate = Literal["kept", "done", "rejected", "failed"]

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.1


class Rejected(Exception):
    """The answer cannot be used, for the reason given; the same is asked again.

    Args:
        reason: for the side file.
        remark: what to tell the model with the next try; without it the same messages are sent again.
    """

    def __init__(self, reason: str, remark: str | None = None) -> None:
        super().__init__(reason)
        self.remark = remark


class Conversation:
    """Questions about one item, one after the other; all of them together have the item's time.

    Attributes:
        last_answer: newest text of the model, accepted or not; None before the first.
        requests: made so far.
    """

    def __init__(self, client: ChatClient, tries: int) -> None:
        self._client, self._tries = client, tries
        self._budget = client.budget()
        self._retries = self._budget.retries
        self.last_answer: str | None = None

    @property
    def requests(self) -> int:
        return self._budget.requests

    async def ask(self, messages: Sequence[Message], accept: Callable[[str], Value]) -> Value:
        """One question.

        Args:
            messages: to the model.
            accept: what to make of the answer; raises `Rejected`, and the question is asked again.

        Raises:
            Rejected: so were the answers of all tries.
            BadReply: the last try had no answer in it.
            RequestFailed: there is no answer.
            ServerRefusal: no request of this run can succeed.
        """
        self._budget.retries = self._retries
        question = list(messages)
        tries = 0
        while True:
            tries += 1
            try:
                self.last_answer = await self._client.ask(question, self._budget)
                return accept(self.last_answer)
            except (Rejected, BadReply) as problem:
                if tries >= self._tries:
                    raise
                if isinstance(problem, Rejected) and problem.remark is not None:
                    question = [*messages, {"role": "user", "content": problem.remark}]


@dataclass(frozen=True, kw_only=True)
class _Work(Generic[Item]):
    items: Sequence[Item]
    keys: Callable[[Item], Sequence[Hashable]]
    record_key: Callable[[Record], Hashable | None]
    describe: Callable[[Item], Record]
    order: Callable[[Record], Any]
    # Items begun but not finished, per request in flight: while one waits out a pause, others use its place.
    open_per_place: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True)
class Job(_Work[Item]):
    """Items, the one question about each, and what to make of the answer.

    Attributes:
        items: in the order in which they are asked and written.
        keys: what settles an item: a stored record with any of these keys. The first is its own.
        record_key: the key of a stored record, or of an entry of a side file; None if it has none.
        messages: the question.
        parse: the record to store, from the answer; raises `Rejected`.
        describe: what the side files say of an item that has no record; `record_key` must find its key in it.
        order: sorts the finished output.
    """

    messages: Callable[[Item], list[Message]]
    parse: Callable[[Item, str], Record]

    async def converse(self, item: Item, conversation: Conversation) -> Record:
        """Ask the one question."""
        return await conversation.ask(self.messages(item), lambda answer: self.parse(item, answer))


@dataclass(frozen=True, kw_only=True)
class Conversations(_Work[Item]):
    """Items with several questions about each, where a question may depend on the answers before.

    Attributes:
        converse: asks what there is to ask about an item, and returns the record to store.

    The others are those of `Job`.
    """

    open_per_place: ClassVar[int] = 1  # what is begun is lost by a kill, and a conversation is long

    converse: Callable[[Item, Conversation], Awaitable[Record]]


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        items: of the job.
        kept: had a record before.
        done: got one now.
        rejected: every answer was rejected; they are in `<output>.rejected.jsonl`.
        failed: no answer; they are in `<output>.failed.jsonl`.
        retries: failed requests that were repeated.
        seconds: of the run.
        interrupted: exit status of the signal that ended it, if one did.
        refusal: why it was given up, if it was.
    """

    items: int
    kept: int
    done: int = 0
    rejected: int = 0
    failed: int = 0
    retries: int = 0
    seconds: float = 0.0
    interrupted: int | None = None
    refusal: str | None = None

    @property
    def missing(self) -> int:
        """Items without a record."""
        return self.items - self.kept - self.done

    @property
    def exit_status(self) -> int:
        """0 if every item has its record; 130 or 143 after a signal; 2 if the server refuses; otherwise 1."""
        if self.interrupted is not None:
            return self.interrupted
        if self.refusal is not None:
            return 2
        return 1 if self.missing else 0


def run(
    job: Job[Item] | Conversations[Item],
    client: ChatClient,
    output: str | Path,
    *,
    tries: int = 3,
    give_up_after: int = 20,
    settled: Callable[[Item, Fate], None] | None = None,
    say: Callable[[str], None] = print,
    unit: str = "item",
) -> Outcome:
    """Ask for every item that has no record in `output` yet.

    Each finished record is appended to `output` at once. Items without one go to `<output>.rejected.jsonl` or
    `<output>.failed.jsonl` with the reason, and are asked again by the next run. At the end `output` is put in order.
    Ctrl-C or SIGTERM stops handing out items and leaves those in flight a few seconds to finish.

    Args:
        job: the items.
        client: not yet entered.
        output: JSON-lines file.
        tries: how often one question is asked, at most, while its answers are rejected.
        give_up_after: stop when so many items in a row got no answer: the server is down, or refuses them all.
        settled: called for every item that has a record ("kept", at the start) or that this run finished, with how.
        say: shows a sentence.
        unit: what an item is called in the progress bar.

    Raises:
        InputError: another process writes `output`.
        OSError: a record cannot be written; those before it are safe.
    """
    from tbps_common.run.stop import Interruption

    with Journal(output) as journal:
        if journal.torn:
            say(f"{output}: the last line was cut short when an earlier run was killed; it is dropped and asked again")
        if journal.unreadable:
            say(f"{output}: {len(journal.unreadable)} lines cannot be read; they are kept at the top of the file")
        stored = {job.record_key(record) for record in journal.records} - {None}
        waiting = [item for item in job.items if stored.isdisjoint(job.keys(item))]
        outcome = Outcome(len(job.items), len(job.items) - len(waiting))
        if settled is not None:
            for item in job.items:
                if not stored.isdisjoint(job.keys(item)):
                    settled(item, "kept")
        sides = {fate: Journal(f"{output}.{fate}.jsonl") for fate in ("rejected", "failed")}
        earlier = [(fate, entry) for fate, side in sides.items() for entry in side.records]
        try:
            started = time.perf_counter()
            with Interruption() as interruption:
                attempt = _Attempt(job, client, journal, sides, outcome, tries, give_up_after, settled, say, unit)
                asyncio.run(attempt.drive(waiting, lambda: interruption.requested))
                if interruption.requested and outcome.missing:
                    outcome.interrupted = interruption.exit_status
            outcome.seconds, outcome.retries = time.perf_counter() - started, client.retries
            journal.rewrite(sorted(journal.records, key=job.order))
            _tidy(job, journal, sides, earlier)
        finally:
            for side in sides.values():
                side.close()
                if side.path.stat().st_size == 0:
                    side.path.unlink()
    return outcome


def ask_once(
    client: ChatClient, messages: Sequence[Message], accept: Callable[[str], Value], *, tries: int = 3
) -> Value:
    """One question outside of a run, waited for.

    Args:
        client: not yet entered; it may be used again.
        messages: to the model.
        accept: what to make of the answer; raises `Rejected`.
        tries: how often it is asked, at most, while its answers are rejected.

    Raises:
        Rejected: so were the answers of all tries.
        BadReply: the last try had no answer in it.
        RequestFailed: there is no answer.
        ServerRefusal: no request to this server can succeed.
    """

    async def once() -> Value:
        client.stopping = False  # an earlier refusal may have been put right
        async with client:
            return await Conversation(client, tries).ask(messages, accept)

    return asyncio.run(once())


class _Attempt(Generic[Item]):
    """One run's workers and what they share."""

    def __init__(
        self,
        job: Job[Item] | Conversations[Item],
        client: ChatClient,
        journal: Journal,
        sides: dict[str, Journal],
        outcome: Outcome,
        tries: int,
        give_up_after: int,
        settled: Callable[[Item, Fate], None] | None,
        say: Callable[[str], None],
        unit: str,
    ) -> None:
        self.job, self.client, self.journal, self.sides, self.outcome = job, client, journal, sides, outcome
        self.tries, self.give_up_after, self.settled = tries, give_up_after, settled
        self.say, self.unit = say, unit
        self.failures_in_a_row = 0

    async def drive(self, waiting: Sequence[Item], stop: Callable[[], bool]) -> None:
        """Run the workers to their end, or until `stop` or a refusal."""
        if not waiting:
            return
        with Progress(self.outcome.items, initial=self.outcome.kept, unit=self.unit, say=self.say) as progress:
            await self._drive(waiting, stop, progress)

    async def _drive(self, waiting: Sequence[Item], stop: Callable[[], bool], progress: Progress) -> None:
        items = iter(waiting)
        async with self.client:
            count = min(len(waiting), self.client.concurrency * self.job.open_per_place)
            running = {asyncio.create_task(self._work(items, progress)) for _ in range(count)}
            leave_at: float | None = None
            try:
                while running:
                    finished, running = await asyncio.wait(
                        running, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in finished:
                        task.result()
                    self.client.stopping = self.client.stopping or stop()
                    if self.client.stopping and leave_at is None:
                        leave_at = time.monotonic() + _GRACE_SECONDS
                    if leave_at is not None and time.monotonic() > leave_at:
                        break
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _work(self, items: Iterator[Item], progress: Progress) -> None:
        for item in items:
            if self.client.stopping:
                return
            try:
                fate, entry = await self._settle(item)
            except Stopped:
                return
            except ServerRefusal as refusal:
                self.outcome.refusal = str(refusal)
                return
            self._note(fate, entry)
            if self.settled is not None:
                self.settled(item, fate)
            progress.update(
                int(fate == "done"),
                retries=self.client.retries,
                rejected=self.outcome.rejected,
                failed=self.outcome.failed,
            )

    async def _settle(self, item: Item) -> tuple[Fate, Record]:
        """Ask until there is a record or the item's budget is spent."""
        conversation = Conversation(self.client, self.tries)
        try:
            return "done", await self.job.converse(item, conversation)
        except (Rejected, BadReply, RequestFailed) as problem:
            entry = {**self.job.describe(item), "reason": str(problem), "requests": conversation.requests}
            if isinstance(problem, RequestFailed):
                return "failed", entry
            answer = conversation.last_answer
            return "rejected", entry if answer is None else {**entry, "reply": answer}

    def _note(self, fate: Fate, entry: Record) -> None:
        (self.journal if fate == "done" else self.sides[fate]).append(entry)
        setattr(self.outcome, fate, getattr(self.outcome, fate) + 1)
        self.failures_in_a_row = self.failures_in_a_row + 1 if fate == "failed" else 0
        if self.failures_in_a_row >= self.give_up_after and not self.client.stopping:
            self.client.stopping = True
            self.outcome.refusal = (
                f"{self.failures_in_a_row} {self.unit}s in a row got no answer from {self.client.server} "
                f"(last: {entry['reason']}): see to the server, then run the same command again"
            )


def _tidy(
    job: Job[Any] | Conversations[Any], journal: Journal, sides: dict[str, Journal], earlier: list[tuple[str, Record]]
) -> None:
    """Keep in the side files the newest entry of every item that still has no record."""
    settled = {job.record_key(record) for record in journal.records}
    # This run settles an item once, so its entries replace all earlier ones, whichever file they are in.
    newest = {job.record_key(entry): (fate, entry) for fate, entry in earlier}
    for fate, side in sides.items():
        old = sum(of == fate for of, _ in earlier)
        newest.update({job.record_key(entry): (fate, entry) for entry in side.records[old:]})
    for fate, side in sides.items():
        kept = [entry for key, (of, entry) in newest.items() if of == fate and key is not None and key not in settled]
        side.rewrite(sorted(kept, key=job.order))
