"""`fafa-syncpr quadruples`: let a chat model write the captions and edits of people drawn from seed lists."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from fafa.syncpr.answers import read_quadruples
from fafa.syncpr.libraries import require_extra
from fafa.syncpr.prompts import QUADRUPLE_KEYS, QUADRUPLE_PROMPT_MARK, quadruple_messages
from fafa.syncpr.records import DROPPED_SUFFIX, QUADRUPLES, REQUESTS, SeenCaptions
from fafa.syncpr.seeds import SeedLists, read_seed_lists
from tbps_common.errors import InputError
from tbps_common.files import write_text
from tbps_common.pipeline.stages import Outcome, Shard, begin_manifest, finish_manifest, run_stage
from tbps_common.run.arguments import number, whole_number

DESCRIPTION = """\
Let a chat model of any OpenAI-compatible server write quadruples: two captions of one person in different pictures, and
the edits from one to the other and back.

  export OPENAI_API_KEY=...
  fafa-syncpr quadruples --out syncpr --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-72B-Instruct \\
    --count 140500 --workers 64

Who the people are is drawn from seed lists (--attributes), reproducibly by --seed. Answers are checked, unusable ones are
asked again, captions that occurred before are dropped. Everything is on the disk at once: after a kill the same command
goes on. Writes requests.jsonl (the answers), quadruples.jsonl, quadruples.jsonl.dropped.jsonl (with reasons) and a
manifest. Exit status 0 when there are --count quadruples.
"""

_MOST_ROUNDS = 5  # further requests for what was dropped, before a model that answers badly is given up


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage, beside `--out` and `--shard`."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", "--base_url", help="address up to /v1; None: OPENAI_BASE_URL, or else OpenAI's own"
    )
    server.add_argument("--model", default="Qwen/Qwen2.5-72B-Instruct", help="name of the model on the server")
    server.add_argument(
        "--api-key-env", "--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key"
    )
    server.add_argument("--workers", type=whole_number(1), default=8, help="requests in flight")
    add_request_flags(server, max_tokens=4096)
    what = parser.add_argument_group("quadruples")
    what.add_argument("--count", type=whole_number(1), default=1000, help="quadruples to have, over all shards")
    what.add_argument("--per-request", type=whole_number(1), default=5, help="quadruples asked for at once")
    what.add_argument("--temperature", type=number(0), default=1.0, help="of the model's choice of words")
    what.add_argument("--seed", type=whole_number(0), default=0, help="of the attribute combinations")
    what.add_argument("--attributes", metavar="FILE", help="seed lists in the form of fafa/syncpr/attributes.json")
    what.add_argument("--tries", type=whole_number(1), default=3, help="questions per request with unusable answers")
    what.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the quadruples that are there; --no-resume refuses a folder that has some",
    )
    what.add_argument("--dry-run", action="store_true", help="show the first prompts and send nothing")


def add_request_flags(group: Any, *, max_tokens: int) -> None:
    """What both stages that ask a chat model share."""
    group.add_argument("--timeout", type=number(0, above=True), default=120.0, help="seconds for one answer")
    group.add_argument(
        "--deadline",
        type=number(0, above=True),
        default=1200.0,
        help="seconds for one request with all its repetitions",
    )
    group.add_argument("--max-retries", type=whole_number(0), default=6, help="repetitions after errors of the server")
    group.add_argument(
        "--max-tokens", "--max_tokens", type=whole_number(1), default=max_tokens, help="longest answer, in tokens"
    )


def run(flags: argparse.Namespace) -> int:
    """Run the stage; returns the exit status."""
    lists = read_seed_lists(flags.attributes)
    shard: Shard = flags.shard
    if flags.dry_run:
        for place in range(min(3, _requests_for(_share(flags.count, shard), flags.per_request))):
            print(_messages(lists, flags, _request_number(shard, place))[0]["content"], end="\n\n---\n\n")
        print("nothing was sent")
        return 0
    require_extra("quadruples", "openai")
    return _Stage(flags, lists).run()


def _share(count: int, shard: Shard) -> int:
    return count // shard.count + (shard.index <= count % shard.count)


def _requests_for(quadruples: int, per_request: int) -> int:
    return -(-quadruples // per_request)


def _request_number(shard: Shard, place: int) -> int:
    """Number of a shard's request, such that the shards share the numbers out among them without end."""
    return shard.index - 1 + place * shard.count


def _messages(lists: SeedLists, flags: argparse.Namespace, request: int) -> list[dict[str, Any]]:
    first = request * flags.per_request
    return quadruple_messages([lists.draw(flags.seed, first + place) for place in range(flags.per_request)])


class _Stage:
    """One run of the stage."""

    def __init__(self, flags: argparse.Namespace, lists: SeedLists):
        self.flags, self.lists = flags, lists
        self.requests: Path = flags.shard.file(flags.out, REQUESTS)
        self.output: Path = flags.shard.file(flags.out, QUADRUPLES)
        self.wanted = _share(flags.count, flags.shard)
        self.settings = {
            "model": flags.model,
            "per_request": flags.per_request,
            "temperature": flags.temperature,
            "max_tokens": flags.max_tokens,
            "seed": flags.seed,
            "attributes": lists.fingerprint,
            "prompt": QUADRUPLE_PROMPT_MARK,
        }

    def run(self) -> int:
        """Ask, and ask for more in place of what was dropped, until there are enough."""
        flags = self.flags
        if not flags.resume and self.requests.exists():
            raise InputError(f"{self.requests} exists already and --no-resume is given: name another folder with --out")
        client = self._client()  # what is wrong with the key or the address is said before anything is written
        notes = {"server": client.server, "command": "fafa-syncpr quadruples", "shard": str(flags.shard)}
        begin_manifest(self.output, self.settings, notes)
        places = max(_requests_for(self.wanted, flags.per_request), self._places_answered())
        seconds, asked = 0.0, 0
        for _ in range(_MOST_ROUNDS):
            outcome = self._ask(client, places, notes)
            asked, seconds = asked + outcome.done, seconds + outcome.seconds
            kept = self._assemble(outcome.seconds)
            if kept >= self.wanted or outcome.interrupted is not None or outcome.refusal or outcome.failed:
                break
            places += _requests_for(self.wanted - kept, flags.per_request)
        print(
            f"{asked} requests answered in {seconds:.1f} s ({asked / max(seconds, 1e-9):.2f} per second, "
            f"{client.retries} repeated, {outcome.rejected} without a usable answer, {outcome.failed} without an answer)"
        )
        if outcome.refusal:
            raise InputError(outcome.refusal)
        if outcome.interrupted is not None:
            print("stopped; the same command goes on", file=sys.stderr)
            return outcome.interrupted
        if kept < self.wanted:
            fewer = flags.count - (self.wanted - kept) * flags.shard.count
            other = f", or go on with those there are by --count {fewer}" if fewer > 0 else ""
            print(f"{self.wanted - kept} quadruples are missing: run the same command again{other}", file=sys.stderr)
            return 1
        return 0

    def _places_answered(self) -> int:
        """How far earlier runs came, those included that asked for more in place of what was dropped."""
        from tbps_common.pipeline.journal import read_json_lines

        if not self.requests.exists():
            return 0
        records = [record for _, record in read_json_lines(self.requests) if isinstance(record, dict)]
        numbers = [record["request"] for record in records if type(record.get("request")) is int]
        return 1 + max(numbers) // self.flags.shard.count if numbers else 0

    def _client(self) -> Any:
        from tbps_common.pipeline import ChatClient

        flags = self.flags
        return ChatClient(
            flags.model,
            base_url=flags.base_url,
            api_key_env=flags.api_key_env,
            concurrency=flags.workers,
            timeout=flags.timeout,
            deadline=flags.deadline,
            max_retries=flags.max_retries,
            sampling={"temperature": flags.temperature, "max_tokens": flags.max_tokens},
        )

    def _ask(self, client: Any, places: int, notes: dict[str, Any]) -> Outcome:
        from tbps_common.pipeline.chat import Conversation, in_conversations

        flags = self.flags

        async def converse(item: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
            request = item["request"]
            texts = await conversation.ask(
                _messages(self.lists, flags, request), lambda answer: read_quadruples(answer, flags.per_request)
            )
            entries = [
                {"id": request * flags.per_request + place, **(text if isinstance(text, dict) else {"reason": text})}
                for place, text in enumerate(texts)
            ]
            return {**item, "quadruples": entries}

        return run_stage(
            [{"request": _request_number(flags.shard, place)} for place in range(places)],
            in_conversations(client, converse, tries=flags.tries),
            self.requests,
            key=lambda entry: entry["request"] if type(entry.get("request")) is int else None,
            settings=self.settings,
            notes=notes,
            unit="request",
        )

    def _assemble(self, seconds: float) -> int:
        """Write the quadruples out of all answers, without duplicates; returns their number."""
        from tbps_common.pipeline.journal import encode

        answers, unusable = _read_answers(self.requests)
        seen = SeenCaptions()
        kept: list[dict[str, Any]] = []
        dropped: list[dict[str, Any]] = []
        for entry in (entry for answer in answers for entry in answer["quadruples"]):
            if "reason" in entry:
                dropped.append(entry)
            elif seen.take(entry["caption_1"], entry["caption_2"]):
                kept.append({name: entry[name] for name in ("id", *QUADRUPLE_KEYS)})
            else:
                dropped.append({**entry, "reason": "duplicate caption"})
        reasons = Counter(entry["reason"] for entry in dropped)
        if unusable:
            reasons["no usable answer"] = unusable * self.flags.per_request
        write_text(self.output, b"".join(map(encode, kept)).decode())
        aside = Path(f"{self.output}{DROPPED_SUFFIX}")
        if dropped:
            write_text(aside, b"".join(map(encode, dropped)).decode())
        else:
            aside.unlink(missing_ok=True)
        finish_manifest(
            self.output,
            finished=len(kept) >= self.wanted,
            items=len(kept) + sum(reasons.values()),
            kept=len(kept),
            dropped=dict(reasons),
            seconds=seconds,
        )
        listed = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        print(f"{self.output}: {len(kept)} of {self.wanted} quadruples" + (f"; dropped: {listed}" if listed else ""))
        return len(kept)


def _read_answers(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The stored answers in the order of their requests, and the number of requests that never got a usable one."""
    from tbps_common.pipeline.journal import read_json_lines

    answers = []
    for line, record in read_json_lines(path):
        entries = record.get("quadruples") if isinstance(record, dict) else None
        if not isinstance(record, dict) or type(record.get("request")) is not int or not isinstance(entries, list):
            raise InputError(f"{path}, line {line + 1}, is no answer of this command: mend or delete the line")
        if not all(
            isinstance(entry, dict) and ("reason" in entry or entry.keys() >= set(QUADRUPLE_KEYS)) for entry in entries
        ):
            raise InputError(f"{path}, line {line + 1}, holds damaged quadruples: mend or delete the line")
        answers.append(record)
    rejected = Path(f"{path}.rejected.jsonl")
    unusable = len(read_json_lines(rejected)) if rejected.exists() else 0
    return sorted(answers, key=lambda record: record["request"]), unusable
