"""`annotate.py`, `dp-annotate`: let a chat model rewrite the captions of edited images."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from dp_gen.annotation import Row, build_prompt, read_rows, reject_response, select_rows
from tbps_common.errors import InputError
from tbps_common.pipeline.journal import Journal
from tbps_common.run.arguments import HelpFormatter, number, whole_number
from tbps_common.run.command import command

__all__ = ["build_prompt", "main", "reject_response", "select_rows"]

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

Every finished row is on the disk at once. After Ctrl-C, a kill or a failure run the same command again: it asks for the
missing rows only. Rows without a usable answer stand in <output_path>.rejected.jsonl and <output_path>.failed.jsonl.
Exit status: 0 if every row of the range has its caption, otherwise not 0.
"""

_TRIES = 3  # questions per row while its answers are rejected
_SHOWN = 20


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
    from tqdm import tqdm

    from tbps_common.pipeline import ChatClient, run

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
    )

    def say(sentence: str) -> None:
        tqdm.write(sentence, file=sys.stdout)

    outcome = run(
        _job(rows, args.model),
        client,
        args.output_path,
        tries=_TRIES,
        settled=_slice_reports(rows, args.SLICE_STEP, say),
        say=say,
        unit="row",
    )
    rate = f", {outcome.done / outcome.seconds:.1f} rows/s" if outcome.done else ""
    print(
        f"{outcome.kept + outcome.done} of {outcome.items + unusable} rows have their caption in {args.output_path} "
        f"({outcome.kept} from before): {outcome.rejected} rejected, {outcome.failed} failed, {unusable} unusable input "
        f"lines, {outcome.missing - outcome.rejected - outcome.failed} not asked; {outcome.retries} requests repeated, "
        f"{outcome.seconds:.1f} s{rate}",
        flush=True,
    )
    if outcome.refusal is not None:
        raise InputError(outcome.refusal)
    if outcome.interrupted is not None:
        print("stopped; the same command goes on with the missing rows", file=sys.stderr)
    return outcome.exit_status or (1 if unusable else 0)


def _job(rows: list[Row], model: str) -> Any:
    from dp_gen.annotation.prompts import rejection_reason, sentence_of
    from tbps_common.pipeline import Job, Rejected

    def parse(row: Row, reply: str) -> dict[str, Any]:
        sentence = sentence_of(reply)
        if reject_response(sentence):
            raise Rejected(rejection_reason(sentence))
        return {
            **row.fields,
            "index": row.index,
            "instruction": row.instruction,
            "output": sentence,
            "base_description": row.fields["base_description"],
            "reference_attribute_list": row.fields["reference_attribute_list"],
            "model": model,
        }

    places = {row.instruction: row.index for row in reversed(rows)}
    return Job(
        items=rows,
        # Rows that the released code wrote have no index: their prompt alone tells them apart.
        keys=lambda row: ((row.index, row.instruction), (None, row.instruction)),
        record_key=_record_key,
        messages=lambda row: [{"role": "user", "content": row.instruction}],
        parse=parse,
        describe=lambda row: {**row.fields, "index": row.index, "instruction": row.instruction},
        order=lambda record: (
            record["index"] if isinstance(record.get("index"), int) else places.get(str(record.get("instruction")), -1)
        ),
    )


def _record_key(record: dict[str, Any]) -> Hashable | None:
    index, instruction = record.get("index"), record.get("instruction")
    if not isinstance(instruction, str) or not (record.get("output") or "reason" in record):
        return None
    return (index if isinstance(index, int) else None, instruction)


def _slice_reports(rows: list[Row], step: int, say: Callable[[str], None]) -> Callable[[Row, str], None]:
    """Counts settled rows, and says so when all asked rows of a slice are settled."""
    first = rows[0].index if rows else 0
    sizes = Counter((row.index - first) // step for row in rows)
    fates: dict[int, Counter[str]] = {}

    def settled(row: Row, fate: str) -> None:
        place = (row.index - first) // step
        counts = fates.setdefault(place, Counter())
        counts[fate] += 1
        if counts.total() == sizes[place]:
            start = first + place * step
            shown = ", ".join(f"{count} {of}" for of, count in sorted(counts.items()))
            say(f"rows {start} to {start + step - 1}: {shown}")

    return settled


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
    server.add_argument("--max_retries", type=whole_number(0), default=6, help="repeated requests per row")
    server.add_argument("--min_interval", type=number(0), default=0.0, help="seconds between the starts of requests")
    server.add_argument("--timeout", type=number(0, above=True), default=60.0, help="seconds for one request")
    server.add_argument(
        "--row_deadline", type=number(0, above=True), default=600.0, help="seconds for one row, all its requests"
    )
    server.add_argument("--dry_run", action="store_true", help="show the prompts and send nothing")
    sampling = parser.add_argument_group("sampling (additions; the released values except --max_tokens, once 4096)")
    sampling.add_argument("--temperature", type=number(0), default=1.0, help="of the model's choice of words")
    sampling.add_argument("--top_p", type=number(0, above=True), default=0.9, help="probability mass to choose from")
    sampling.add_argument("--frequency_penalty", type=number(-2), default=0.2, help="against repeating a word often")
    sampling.add_argument("--presence_penalty", type=number(-2), default=0.5, help="against repeating a word at all")
    sampling.add_argument("--max_tokens", type=whole_number(1), default=512, help="longest answer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
