"""`annotate.py`, `dp-annotate`: let a chat model rewrite the captions of edited images."""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError
from tbps_common.pipeline.chat import Conversation, Rejected, in_conversations
from tbps_common.pipeline.client import ChatClient, request_fields
from tbps_common.pipeline.journal import Journal, Record, read_json_lines
from tbps_common.pipeline.stages import Dropped, Results, Work, run_stage, say
from tbps_common.run.arguments import HelpFormatter, number, whole_number
from tbps_common.run.command import command

__all__ = ["Row", "build_prompt", "main", "read_rows", "reject_response", "select_rows"]

DESCRIPTION = """\
Rewrite the captions of edited images with a chat model of any OpenAI-compatible server.

The paper's command, run from packages/dp_gen:

  python annotate.py \\
    --origin_path {DATA_PATH} \\
    --output_path {ANNOTATION_JSONL_PATH} \\
    --model "gpt-3.5-turbo" \\
    --TEXT_START 0 \\
    --TEXT_END -1 \\
    --SLICE_STEP 500

DATA_PATH holds one JSON object per line: "base_description" (the original caption) and "reference_attribute_list" (the
attributes to put in), as generate.py writes them to edits.jsonl. The key comes from the environment variable
OPENAI_API_KEY, the server from --base_url or OPENAI_BASE_URL.

Every finished row is written to disk immediately. After Ctrl-C, a kill or a failure run the same command again: it asks for the
missing rows only. Rows without a usable answer stand in <output_path>.rejected.jsonl and <output_path>.failed.jsonl.
Exit status: 0 if every row of the range has its caption, otherwise not 0.
"""

_SHOWN = 20

SHORTEST_REPLY = 30

# An answer that talks about the task instead of doing it, or gives the instruction back.
_NOT_A_CAPTION = re.compile(
    r"sorry|抱歉"
    r"|\bprompts?\b"
    r"|rewritten sentence|list of attributes|the listed one"
    r"|(?:^|[.!?:]\s+)(?:please\s+)?(?:modify|rewrite|replace|propose|put|keep|answer|if)\b",
    re.IGNORECASE,
)

_PROMPT = """\
Below is a sentence that describes a pedestrian, and a list of attributes that the pedestrian has now. Rewrite the \
sentence: wherever it mentions an attribute that one of the list corresponds to (hair, upper clothing, lower clothing, \
shoes, a bag and so on), put the listed one in its place. Keep everything else that the sentence says, and its style. \
Answer with the rewritten sentence only.

Sentence: {description}
Attributes: {attributes}
Rewritten sentence:"""


@dataclass(frozen=True)
class Row:
    """One line of the input.

    Attributes:
        index: line number, from 0.
        fields: as stored.
        instruction: the full prompt.
    """

    index: int
    fields: dict[str, Any]
    instruction: str


@command
def main(argv: list[str]) -> int:
    """Annotate the rows of a file; returns the exit status."""
    args = build_parser().parse_args(argv)
    if Path(args.origin_path).resolve() == Path(args.output_path).resolve():
        raise InputError(f"--origin_path and --output_path are the same file {args.output_path}: give another output")
    rows, problems = read_rows(args.origin_path, args.TEXT_START, args.TEXT_END)
    for problem in problems[:_SHOWN]:
        print(f"{problem}; this row is left out", file=sys.stderr)
    if len(problems) > _SHOWN:
        print(f"... and {len(problems) - _SHOWN} further rows of {args.origin_path}", file=sys.stderr)
    if args.dry_run:
        for row in rows:
            print(f"--- row {row.index}\n{row.instruction}\n")
        print(f"{len(rows)} prompts; nothing was sent")
        return 1 if problems else 0
    if not rows and not problems:
        print(f"{args.origin_path} holds no rows in the range {args.TEXT_START} to {args.TEXT_END}: nothing to do")
        Journal(args.output_path).close()
        return 0
    return _annotate(args, rows, len(problems))


def _annotate(args: argparse.Namespace, rows: list[Row], unusable: int) -> int:
    client = ChatClient(
        args.model,
        base_url=args.base_url,
        api_key_env=args.api_key_env,
        concurrency=args.concurrency,
        timeout=args.timeout,
        deadline=args.row_deadline,
        max_retries=args.max_retries,
        min_interval=args.min_interval,
        sampling={
            name: getattr(args, name)
            for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty", "max_tokens")
        },
        fields=args.request_fields,
    )

    async def converse(row: Record, conversation: Conversation) -> Record:
        sentence = await conversation.ask([{"role": "user", "content": row["instruction"]}], accept)
        return {**row, "output": sentence, "model": args.model}

    places = {row.instruction: row.index for row in reversed(rows)}
    outcome = run_stage(
        [{**row.fields, "index": row.index, "instruction": row.instruction} for row in rows],
        _with_reports(in_conversations(client, converse), rows, args.SLICE_STEP),
        args.output_path,
        key=_key(args.output_path),
        order=lambda record: (
            record["index"] if isinstance(record.get("index"), int) else places.get(str(record.get("instruction")), -1)
        ),
        unit="row",
    )
    rate = f", {outcome.done / outcome.seconds:.1f} rows/s" if outcome.done else ""
    print(
        f"{outcome.items - outcome.missing} of {outcome.items + unusable} rows have their caption in {args.output_path} "
        f"({outcome.before} from before): {outcome.rejected} rejected, {outcome.failed} failed, {unusable} unusable input "
        f"lines, {outcome.missing - outcome.rejected - outcome.failed} not asked; {client.retries} requests repeated, "
        f"{outcome.seconds:.1f} s{rate}",
        flush=True,
    )
    if outcome.refusal is not None:
        raise InputError(outcome.refusal)
    if outcome.interrupted is not None:
        print("stopped; run the same command again to continue with the missing rows", file=sys.stderr)
    return outcome.exit_status or (1 if unusable else 0)


def _key(output: str) -> Callable[[Record], Hashable]:
    """What makes a row itself: its number and its prompt; the prompt alone where the released code has answered it."""
    stored = [entry for _, entry in read_json_lines(output) if isinstance(entry, dict)] if Path(output).exists() else []
    released = {entry.get("instruction") for entry in stored if not isinstance(entry.get("index"), int)}

    def key(entry: Record) -> Hashable:
        instruction = entry.get("instruction")
        if not isinstance(instruction, str) or ("output" in entry and not entry["output"]):
            return None
        return (None if instruction in released else entry.get("index"), instruction)

    return key


def _with_reports(work: Work, rows: Sequence[Row], step: int) -> Work:
    """The same work, which says so when all asked rows of a slice are settled."""
    first = rows[0].index if rows else 0
    sizes = Counter((row.index - first) // step for row in rows)

    def reporting(items: Sequence[Record], stop: Callable[[], bool]) -> Results:
        fates = {place: Counter(kept=size) for place, size in sizes.items()}
        for item in items:
            fates[(item["index"] - first) // step]["kept"] -= 1

        def report(place: int) -> None:
            if fates[place].total() == sizes[place]:
                shown = ", ".join(f"{count} {fate}" for fate, count in sorted(fates[place].items()) if count)
                say(f"rows {first + place * step} to {first + (place + 1) * step - 1}: {shown}")

        for place in sizes:
            report(place)
        for item, result in work(items, stop):
            yield item, result
            place = (item["index"] - first) // step
            fates[place][result.kind if isinstance(result, Dropped) else "done"] += 1
            report(place)

    return reporting


def select_rows(n: int, start: int, end: int) -> range:
    """Numbers of the rows from `start` up to but without `end`, of `n`; a negative `end` means through the last."""
    stop = n if end < 0 else min(end, n)
    return range(min(start, stop), stop)


def read_rows(path: str | os.PathLike[str], start: int, end: int) -> tuple[list[Row], list[str]]:
    """Rows of the selected lines, and a sentence `file:line: ...` for each that cannot be used.

    Raises:
        DatasetError: the file is missing or is not UTF-8.
    """
    lines = read_json_lines(path)
    selected = select_rows(lines[-1][0] + 1 if lines else 0, start, end)
    rows, problems = [], []
    for index, content in lines:
        if index not in selected:
            continue
        problem = content if isinstance(content, str) else _problem(content)
        if problem is not None:
            problems.append(f"{os.fspath(path)}:{index + 1}: {problem}")
        else:
            assert isinstance(content, dict)
            rows.append(Row(index, content, build_prompt(content)))
    return rows, problems


def _problem(fields: dict[str, Any]) -> str | None:
    description = fields.get("base_description")
    if not isinstance(description, str) or not description.strip():
        return "'base_description' must be a sentence"
    attributes = fields.get("reference_attribute_list")
    listed = [attributes] if isinstance(attributes, str) else attributes
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) and one.strip() for one in listed):
        return "'reference_attribute_list' must be a list of phrases, or one phrase"
    return None


def build_prompt(row: dict[str, Any]) -> str:
    """The one user message for a row, as plain text.

    Args:
        row: `base_description`, a string; `reference_attribute_list`, a list of strings or one string.
    """
    attributes = row["reference_attribute_list"]
    listed = attributes if isinstance(attributes, str) else ", ".join(attributes)
    # No str.format: braces in a description are just characters.
    return _PROMPT.replace("{attributes}", listed, 1).replace("{description}", row["base_description"], 1)


def reject_response(reply: str) -> bool:
    """Whether a reply is not a caption: too short, an apology, or talk about the instruction."""
    return bool(_rejection(reply.strip()))


def _rejection(sentence: str) -> str:
    """Why a sentence is not a caption; empty for a caption."""
    if len(sentence) < SHORTEST_REPLY:
        return f"the answer is shorter than {SHORTEST_REPLY} characters"
    found = _NOT_A_CAPTION.search(sentence)
    return f"the answer is not a caption: it says {found[0].lower()!r}" if found else ""


def accept(reply: str) -> str:
    """The caption in a reply, without the prompt's last words before it, or quotation marks around the whole.

    Raises:
        Rejected: it is not a caption.
    """
    cue = _PROMPT.splitlines()[-1]
    text = reply.strip()
    if text.lower().startswith(cue.lower()):
        text = text[len(cue) :].strip()
    sentence = _unquoted(text)
    if reason := _rejection(sentence):
        raise Rejected(reason)
    return sentence


def _unquoted(text: str) -> str:
    for opening, closing in (('"', '"'), ("“", "”")):
        inner = text[1:-1]
        if (
            len(text) > 1
            and text.startswith(opening)
            and text.endswith(closing)
            and not {opening, closing} & set(inner)
        ):
            return inner.strip()
    return text


def build_parser() -> argparse.ArgumentParser:
    """The flags of `annotate.py`."""
    parser = argparse.ArgumentParser(
        prog="annotate.py", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    authors = parser.add_argument_group("the authors' flags")
    authors.add_argument("--origin_path", required=True, help="JSON lines to annotate")
    authors.add_argument("--output_path", required=True, help="JSON lines with the answers; grows row by row")
    authors.add_argument("--model", default="gpt-3.5-turbo", help="name of the model on the server")
    authors.add_argument("--TEXT_START", type=whole_number(0), default=0, help="first row")
    authors.add_argument("--TEXT_END", type=int, default=-1, help="row after the last one; negative: to the end")
    authors.add_argument("--SLICE_STEP", type=whole_number(1), default=500, help="rows per line of the report")
    server = parser.add_argument_group("server and requests (additions)")
    server.add_argument("--base_url", help="address up to /v1; default: OPENAI_BASE_URL, or else OpenAI's own")
    server.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    server.add_argument("--concurrency", type=whole_number(1), default=8, help="requests in flight")
    server.add_argument("--max_retries", type=whole_number(0), default=6, help="retries per row")
    server.add_argument("--min_interval", type=number(0), default=0.0, help="seconds between the starts of requests")
    server.add_argument("--timeout", type=number(0, above=True), default=60.0, help="seconds for one request")
    server.add_argument(
        "--row_deadline", type=number(0, above=True), default=600.0, help="seconds for one row, all its requests"
    )
    server.add_argument(
        "--request_fields",
        type=request_fields,
        metavar="JSON",
        help='fields of the request to add or change, null to leave one out: {"reasoning_effort": "low"}',
    )
    server.add_argument("--dry_run", action="store_true", help="show the prompts and send nothing")
    sampling = parser.add_argument_group("sampling (additions; the released values except --max_tokens, once 4096)")
    sampling.add_argument("--temperature", type=number(0), default=1.0, help="sampling temperature")
    sampling.add_argument("--top_p", type=number(0, above=True), default=0.9, help="probability mass to choose from")
    sampling.add_argument(
        "--frequency_penalty", type=number(-2), default=0.2, help="penalty for repeating a word often"
    )
    sampling.add_argument(
        "--presence_penalty", type=number(-2), default=0.5, help="penalty for repeating a word at all"
    )
    sampling.add_argument("--max_tokens", type=whole_number(1), default=512, help="longest answer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
