"""`fafa-syncpr quadruples`: let a chat model write the captions and edits of people drawn from seed lists."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from fafa.syncpr.prompts import QUADRUPLE_KEYS, QUADRUPLE_PROMPT_MARK, quadruple_messages, read_quadruples
from fafa.syncpr.records import QUADRUPLES, REQUESTS, are_new, write_records
from fafa.syncpr.seeds import read_seed_lists
from tbps_common.errors import InputError
from tbps_common.pipeline import (
    ChatClient,
    Conversation,
    Record,
    begin_manifest,
    finish_manifest,
    in_conversations,
    read_json_lines,
    run_stage,
)
from tbps_common.pipeline.models import require_libraries

_MOST_ROUNDS = 5  # further requests for what was dropped, before a model that answers badly is given up


def main(flags: argparse.Namespace) -> int:
    """Ask, and ask for more in place of what was dropped, until there are enough; returns the exit status.

    Raises:
        InputError: the flags, the key or earlier answers cannot be used, or the server refuses.
    """
    shard, each = flags.shard, flags.per_request
    lists = read_seed_lists(flags.attributes)
    wanted = flags.count // shard.count + (shard.index <= flags.count % shard.count)
    # Of each request its number; the shards share the numbers out among them without end.
    numbers = [shard.index - 1 + place * shard.count for place in range(-(-wanted // each))]

    def messages(request: int) -> list[Record]:
        return quadruple_messages([lists.draw(flags.seed, request * each + place) for place in range(each)])

    if flags.dry_run:
        for number in numbers[:3]:
            print(messages(number)[0]["content"], end="\n\n---\n\n")
        print("nothing was sent")
        return 0
    require_libraries("fafa-syncpr quadruples", "packages/fafa[syncpr]", "openai")
    answers, output = shard.file(flags.out, REQUESTS), shard.file(flags.out, QUADRUPLES)
    if not flags.resume and answers.exists():
        raise InputError(f"{answers} exists already and --no-resume is given: name another folder with --out")
    client = ChatClient(
        flags.model,
        base_url=flags.base_url,
        api_key_env=flags.api_key_env,
        concurrency=flags.workers,
        timeout=flags.timeout,
        deadline=flags.deadline,
        max_retries=flags.max_retries,
        sampling={"temperature": flags.temperature, "max_tokens": flags.max_tokens},
        fields=flags.request_fields,
    )

    async def converse(item: Record, conversation: Conversation) -> Record:
        first = item["request"] * each
        entries = await conversation.ask(messages(item["request"]), lambda answer: read_quadruples(answer, each))
        return {**item, "quadruples": [{"id": first + place, **entry} for place, entry in enumerate(entries)]}

    names = ("model", "per_request", "temperature", "max_tokens", "seed")
    settings = {name: getattr(flags, name) for name in names}
    settings |= {"attributes": lists.fingerprint, "prompt": QUADRUPLE_PROMPT_MARK}
    if flags.request_fields:
        settings["request_fields"] = flags.request_fields
    notes = {"server": client.server, "command": "fafa-syncpr quadruples", "shard": str(shard)}
    begin_manifest(output, settings, notes)
    # Earlier runs may have asked for more in place of what was dropped.
    places = max(len(numbers), _places_answered(answers, shard.count))
    seconds, asked = 0.0, 0
    for _ in range(_MOST_ROUNDS):
        outcome = run_stage(
            [{"request": shard.index - 1 + place * shard.count} for place in range(places)],
            in_conversations(client, converse, tries=flags.tries),
            answers,
            key=lambda entry: entry["request"] if type(entry.get("request")) is int else None,
            settings=settings,
            notes=notes,
            unit="request",
        )
        asked, seconds = asked + outcome.done, seconds + outcome.seconds
        kept, dropped = _choose(answers)
        write_records(output, kept, dropped)
        reasons = Counter(entry["reason"] for entry in dropped)
        if outcome.rejected:
            reasons["no usable answer"] = outcome.rejected * each
        finish_manifest(
            output,
            finished=len(kept) >= wanted,
            items=len(kept) + reasons.total(),
            kept=len(kept),
            dropped=dict(reasons),
            seconds=outcome.seconds,
        )
        listed = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        print(f"{output}: {len(kept)} of {wanted} quadruples" + (f"; dropped: {listed}" if listed else ""))
        if len(kept) >= wanted or outcome.interrupted is not None or outcome.refusal or outcome.failed:
            break
        places += -(-(wanted - len(kept)) // each)
    print(
        f"{asked} requests answered in {seconds:.1f} s ({asked / max(seconds, 1e-9):.2f} per second, "
        f"{client.retries} repeated, {outcome.rejected} without a usable answer, {outcome.failed} without an answer)"
    )
    if outcome.refusal:
        raise InputError(outcome.refusal)
    if outcome.interrupted is not None:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return outcome.interrupted
    if len(kept) < wanted:
        fewer = flags.count - (wanted - len(kept)) * shard.count
        other = f", or continue with those there are with --count {fewer}" if fewer > 0 else ""
        print(f"{wanted - len(kept)} quadruples are missing: run the same command again{other}", file=sys.stderr)
        return 1
    return 0


def _places_answered(path: Path, shards: int) -> int:
    """How far earlier runs of this shard came."""
    records = [record for _, record in read_json_lines(path) if isinstance(record, dict)] if path.exists() else []
    numbers = [record["request"] for record in records if type(record.get("request")) is int]
    return 1 + max(numbers) // shards if numbers else 0


def _choose(path: Path) -> tuple[list[Record], list[Record]]:
    """The quadruples of all stored answers in the order of the requests: those to keep, and the others with the reason.

    Raises:
        InputError: a line of the answers is damaged.
    """
    answers = []
    for line, record in read_json_lines(path):
        entries = record.get("quadruples") if isinstance(record, dict) else None
        if not isinstance(record, dict) or type(record.get("request")) is not int or not isinstance(entries, list):
            raise InputError(f"{path}, line {line + 1}, is not an answer of this command: correct or delete the line")
        if not all(
            isinstance(entry, dict) and ("reason" in entry or entry.keys() >= set(QUADRUPLE_KEYS)) for entry in entries
        ):
            raise InputError(f"{path}, line {line + 1}, holds damaged quadruples: correct or delete the line")
        answers.append(record)
    seen: set[str] = set()
    kept, dropped = [], []
    for entry in (entry for answer in sorted(answers, key=lambda of: of["request"]) for entry in answer["quadruples"]):
        if "reason" in entry:
            dropped.append(entry)
        elif are_new(seen, entry["caption_1"], entry["caption_2"]):
            kept.append({name: entry[name] for name in ("id", *QUADRUPLE_KEYS)})
        else:
            dropped.append({**entry, "reason": "duplicate caption"})
    return kept, dropped
