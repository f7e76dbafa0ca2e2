"""`fafa-syncpr filter`: measure every pair, ask a vision-language model if one is named, and keep what passes the thresholds."""

import argparse
import base64
import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fafa.syncpr.prompts import QUESTION_KEYS, QUESTION_PROMPT_MARK, question_messages, read_verdict
from fafa.syncpr.records import (
    IMAGES,
    KEPT,
    SCORES,
    VERDICTS,
    Quadruple,
    is_own,
    key_in,
    load_pairs,
    load_quadruples,
    pair_key,
    write_records,
)
from fafa.syncpr.scoring import PairScorer
from tbps_common.errors import DatasetError, InputError
from tbps_common.files import write_json
from tbps_common.images import read_image
from tbps_common.pipeline import (
    ChatClient,
    Conversation,
    Dropped,
    Journal,
    Outcome,
    Record,
    in_batches,
    in_conversations,
    manifest_path,
    read_json_lines,
    run_stage,
)
from tbps_common.pipeline.models import choose_dtype, require_libraries, require_model
from tbps_common.run.device import choose_device, device_sentence

_REASON_VLM = {
    "one_person_each": "a half does not show exactly one person (VLM)",
    "picture_1_fits": "the left half does not fit its caption (VLM)",
    "picture_2_fits": "the right half does not fit its caption (VLM)",
    "same_person": "the halves show different persons (VLM)",
}
# Captions of quadruples that came later (of a request that was asked again) can make one with pictures a duplicate.
_REASON_GONE = "the quadruple is left out since the picture was made"
_SCORES = ("clip_left", "clip_right", "identity", "pair_similarity")
_JPEG_QUALITY = 90


def main(flags: argparse.Namespace) -> int:
    """Score what is not scored yet, ask what has not been asked, choose anew; returns the exit status.

    Raises:
        InputError: flags, records, pictures or models cannot be used, or the server gave no answers.
    """
    extra = ("diffusers", "transformers", *(("openai",) if flags.vlm_model else ()))
    require_libraries("fafa-syncpr filter", "packages/fafa[syncpr]", *extra)
    require_model("--clip", flags.clip, "config.json")
    if flags.person_model is not None:
        require_model("--person-model", flags.person_model, "config.json")
    if flags.vlm_base_url and not flags.vlm_model:
        raise InputError("--vlm-base-url has no effect without --vlm-model: name the model on that server")
    client = _client(flags) if flags.vlm_model else None
    quadruples, _ = load_quadruples(flags.out)
    pictures = [pair for pair in load_pairs(flags.out, IMAGES) if is_own(flags.shard, pair["quadruple_id"])]
    pairs = [pair for pair in pictures if pair["quadruple_id"] in quadruples]
    if pictures and not pairs:
        raise DatasetError(f"{flags.out}: images.jsonl has no picture of the quadruples in quadruples.jsonl")
    kept_before = manifest_path(flags.shard.file(flags.out, KEPT))
    if kept_before.is_file():  # unfinished until this run has chosen anew
        write_json(kept_before, {"finished": False})
    outcome = _score(flags, pairs, quadruples)
    print(outcome.sentence("pair"))
    if outcome.exit_status:
        return outcome.exit_status
    present = set(map(pair_key, pairs))
    scores = [
        record for record in _read(outcome.output, dict.fromkeys(_SCORES, _is_number)) if pair_key(record) in present
    ]
    complaint = ""
    verdicts: dict[Any, dict[str, bool]] = {}
    if client is not None:
        asked = _ask(flags, client, [record for record in scores if failing(record, flags) is None], quadruples)
        print(asked.sentence("pair"))
        if asked.interrupted is not None:
            print("stopped; run the same command again to continue", file=sys.stderr)
            return asked.interrupted
        # Pairs about which the model says nothing usable are dropped; a server that does not answer is another matter.
        complaint = asked.refusal or (f"{asked.failed} pairs got no answer: run again" if asked.failed else "")
        verdicts = {pair_key(record): record["answers"] for record in _read(asked.output, {"answers": _are_answers})}
        _note_verdicts(outcome.output, verdicts)
    write_kept(flags, outcome, scores, verdicts, gone=len(pictures) - len(pairs), finished=not complaint)
    if complaint:
        raise InputError(complaint)
    return 0


def failing(record: Record, flags: argparse.Namespace) -> str | None:
    """The first threshold that a pair's scores miss, in words."""
    if record["clip_left"] < flags.min_image_text:
        return "the left half does not fit its caption (--min-image-text)"
    if record["clip_right"] < flags.min_image_text:
        return "the right half does not fit its caption (--min-image-text)"
    if record["identity"] < flags.min_identity:
        return "the halves show different persons (--min-identity)"
    if record["pair_similarity"] > flags.max_pair_similarity:
        return "the halves are nearly the same (--max-pair-similarity)"
    return None


def _score(flags: argparse.Namespace, pairs: list[Record], quadruples: dict[int, Quadruple]) -> Outcome:
    @functools.cache
    def load() -> PairScorer:  # not at all when only the thresholds are new
        device = choose_device(flags.device)
        dtype = choose_dtype(flags.dtype, device, on_gpu="bfloat16")
        print(device_sentence(flags.device, device, str(dtype).removeprefix("torch.")))
        return PairScorer(flags.clip, device, dtype, person_model=flags.person_model)

    with ThreadPoolExecutor(flags.workers) as readers:

        def score(batch: list[Record]) -> Iterator[Record | Dropped]:
            paths = [(Path(flags.out, pair["left"]), Path(flags.out, pair["right"])) for pair in batch]
            texts = [quadruples[pair["quadruple_id"]] for pair in batch]
            results = load().score(paths, [(text.caption_1, text.caption_2) for text in texts], readers)
            for pair, result in zip(batch, results, strict=True):
                if isinstance(result, str):
                    yield Dropped("a picture cannot be read", {"details": result})
                else:
                    yield {**pair, **asdict(result), "vlm": None}

        output = flags.shard.file(flags.out, SCORES)
        return run_stage(
            pairs,
            in_batches(score, flags.batch_size),
            output,
            key=key_in(output),
            settings={name: getattr(flags, name) for name in ("clip", "person_model", "dtype")},
            notes={"command": "fafa-syncpr filter", "shard": str(flags.shard)},
            unit="pair",
        )


def _client(flags: argparse.Namespace) -> ChatClient:
    return ChatClient(
        flags.vlm_model,
        base_url=flags.vlm_base_url,
        api_key_env=flags.vlm_api_key_env,
        concurrency=flags.vlm_workers,
        timeout=flags.timeout,
        deadline=flags.deadline,
        max_retries=flags.max_retries,
        sampling={"temperature": 0.0, "max_tokens": flags.max_tokens},
        fields=flags.request_fields,
    )


def _ask(
    flags: argparse.Namespace, client: ChatClient, pairs: list[Record], quadruples: dict[int, Quadruple]
) -> Outcome:
    """Put the questions about each pair that has no answer yet."""
    files = {pair_key(pair): [Path(flags.out, pair[side]) for side in ("left", "right")] for pair in pairs}

    async def converse(item: Record, conversation: Conversation) -> Record:
        text = quadruples[item["quadruple_id"]]
        messages = question_messages(text.caption_1, text.caption_2, list(map(data_url, files[pair_key(item)])))
        return {**item, "answers": await conversation.ask(messages, read_verdict)}

    output = flags.shard.file(flags.out, VERDICTS)
    return run_stage(
        [{"quadruple_id": pair["quadruple_id"], "variant": pair["variant"]} for pair in pairs],
        in_conversations(client, converse),
        output,
        key=key_in(output),
        settings={"model": flags.vlm_model, "prompt": QUESTION_PROMPT_MARK},
        notes={"server": client.server},
        order=pair_key,
        unit="pair",
    )


def data_url(path: Path) -> str:
    """The picture as the API takes it."""
    buffer = io.BytesIO()
    read_image(path).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read(path: Path, parts: dict[str, Callable[[Any], bool]]) -> list[Record]:
    """The records of a file of this stage, each of which has these parts in the form that they must have."""
    records = []
    for line, record in read_json_lines(path):
        if isinstance(record, str):
            raise DatasetError(f"{path}, line {line + 1}: {record}")
        wrong = [name for name, fits in parts.items() if not fits(record.get(name))]
        if wrong:
            raise DatasetError(
                f"{path}, line {line + 1}, has no {wrong[0]} that can be used: delete the line to have it made again"
            )
        records.append(record)
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_answers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), bool) for key in QUESTION_KEYS)


def _note_verdicts(path: Path, verdicts: dict[Any, dict[str, bool]]) -> None:
    """Enter the answers into the scores."""
    with Journal(path) as journal:
        journal.rewrite([_with_verdict(record, verdicts.get(pair_key(record))) for record in journal.records])


def _with_verdict(record: Record, answers: dict[str, bool] | None) -> Record:
    return {**record, "vlm": None if answers is None else all(answers.values())}


def write_kept(
    flags: argparse.Namespace,
    scored: Outcome,
    scores: list[Record],
    verdicts: dict[Any, dict[str, bool]],
    *,
    gone: int,
    finished: bool,
) -> None:
    """Write what passes, and what does not with the reason."""
    output = flags.shard.file(flags.out, KEPT)
    kept, dropped = [], []
    for record in scores:
        answers = verdicts.get(pair_key(record))
        record = _with_verdict(record, answers)
        reason = failing(record, flags)
        if reason is None and answers is not None:
            reason = next((_REASON_VLM[key] for key in QUESTION_KEYS if not answers[key]), None)
        if reason is None and flags.vlm_model and answers is None:
            reason = "no usable answer (VLM)"
        if reason is None:
            kept.append(record)
        else:
            dropped.append({**record, "reason": reason})
    reasons = Counter(record["reason"] for record in dropped)
    reasons.update(scored.dropped)
    if gone:
        reasons[_REASON_GONE] = gone
    manifest = {
        "command": "fafa-syncpr filter",
        "settings": {
            name: getattr(flags, name)
            for name in ("clip", "person_model", "min_image_text", "min_identity", "max_pair_similarity", "vlm_model")
        },
        "finished": False,
    }
    write_json(manifest_path(output), manifest)
    write_records(output, kept, dropped)
    items = scored.items + gone
    counts = {"items": items, "kept": len(kept), "dropped": dict(reasons)}
    write_json(manifest_path(output), {**manifest, **counts, "finished": finished})
    listed = "".join(f"\n  {count} dropped: {reason}" for reason, count in reasons.most_common())
    print(f"{output}: {len(kept)} of {items} pairs kept{listed}")
