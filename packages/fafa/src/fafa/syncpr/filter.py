"""`fafa-syncpr filter`: measure every pair, ask a model that sees if one is named, and keep what passes the thresholds."""

import argparse
import base64
import io
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fafa.syncpr.libraries import require_extra, require_model_folder
from fafa.syncpr.prompts import QUESTION_KEYS, QUESTION_PROMPT_MARK, question_messages
from fafa.syncpr.quadruples import add_request_flags
from fafa.syncpr.records import (
    DROPPED_SUFFIX,
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
)
from tbps_common.datasets import read_json
from tbps_common.errors import DatasetError, InputError
from tbps_common.files import write_json, write_text
from tbps_common.pipeline.stages import Dropped, Outcome, in_batches, manifest_path, run_stage
from tbps_common.run.arguments import number, whole_number

DESCRIPTION = """\
Keep the pairs that show what they should.

  fafa-syncpr filter --out syncpr --clip openai/clip-vit-large-patch14
  fafa-syncpr filter --out syncpr --clip openai/clip-vit-large-patch14 --min-identity 0.8 \\
    --vlm-base-url http://localhost:8000/v1 --vlm-model Qwen/Qwen2.5-VL-7B-Instruct

Measured for every pair (scores.jsonl): the cosine of each half and its caption, the similarity of the two halves as
persons (--person-model, or CLIP) and as pictures. A pair whose halves are nearly the same picture is of no use either. The
model that sees is asked only about pairs that pass the thresholds. What passes everything is in kept.jsonl, the rest with
the reason in kept.jsonl.dropped.jsonl. Scores and answers are computed once: other thresholds take effect at once. The
paper names neither its filter models nor its thresholds; these are ours, so look at scores.jsonl before you choose.
"""

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage, beside `--out`, `--shard`, `--device` and `--dtype`."""
    model = parser.add_argument_group("models")
    model.add_argument(
        "--clip", default="openai/clip-vit-large-patch14", help="folder or hub name of an image-text model"
    )
    model.add_argument("--person-model", help="image model for --min-identity; None: CLIP's picture features")
    thresholds = parser.add_argument_group("thresholds (cosines)")
    thresholds.add_argument("--min-image-text", type=number(-1), default=0.2, help="each half and its caption")
    thresholds.add_argument("--min-identity", type=number(-1), default=0.7, help="left and right half, as persons")
    thresholds.add_argument(
        "--max-pair-similarity", type=number(-1), default=0.97, help="left and right half, as pictures, by CLIP"
    )
    vlm = parser.add_argument_group("model that sees (optional)")
    vlm.add_argument("--vlm-model", help="name on an OpenAI-compatible server; without it nobody is asked")
    vlm.add_argument("--vlm-base-url", help="address up to /v1; None: OPENAI_BASE_URL, or else OpenAI's own")
    vlm.add_argument("--vlm-api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    vlm.add_argument("--vlm-workers", type=whole_number(1), default=8, help="requests in flight")
    add_request_flags(vlm, max_tokens=256)
    run_group = parser.add_argument_group("run")
    run_group.add_argument("--batch-size", type=whole_number(1), default=64, help="pairs at a time")
    run_group.add_argument("--workers", type=whole_number(1), default=8, help="threads that read pictures")


def run(flags: argparse.Namespace) -> int:
    """Run the stage; returns the exit status."""
    require_extra("filter", "diffusers", "transformers", *(("openai",) if flags.vlm_model else ()))
    require_model_folder(flags.clip, "config.json", "--clip")
    if flags.person_model is not None:
        require_model_folder(flags.person_model, "config.json", "--person-model")
    if flags.vlm_base_url and not flags.vlm_model:
        raise InputError("--vlm-base-url has no effect without --vlm-model: name the model on that server")
    client = _client(flags) if flags.vlm_model else None
    quadruples, _ = load_quadruples(flags.out)
    pairs = load_pairs(flags.out, IMAGES)
    pictures = [pair for pair in pairs if is_own(flags.shard, pair["quadruple_id"])]
    pairs = [pair for pair in pictures if pair["quadruple_id"] in quadruples]
    if pictures and not pairs:
        raise DatasetError(f"{flags.out}: images.jsonl has no picture of the quadruples in quadruples.jsonl")
    _reopen(manifest_path(flags.shard.file(flags.out, KEPT)))
    outcome = _score(flags, pairs, quadruples)
    print(outcome.sentence("pair"))
    if outcome.exit_status:
        return outcome.exit_status
    scores = _read(outcome.output, dict.fromkeys(_SCORES, _is_number))
    present = set(map(pair_key, pairs))
    scores = [record for record in scores if pair_key(record) in present]
    complaint = ""
    verdicts: dict[Any, dict[str, bool]] = {}
    if client is not None:
        passing = [record for record in scores if failing(record, flags) is None]
        asked = _ask(flags, client, passing, quadruples)
        if asked.interrupted is not None:
            print("stopped; the same command goes on", file=sys.stderr)
            return asked.interrupted
        # Pairs about which the model says nothing usable are dropped; a server that does not answer is another matter.
        complaint = asked.refusal or (f"{asked.failed} pairs got no answer: run again" if asked.failed else "")
        verdicts = {
            pair_key(record): record["answers"] for record in _read(_verdict_file(flags), {"answers": _are_answers})
        }
        _note_verdicts(outcome.output, verdicts)
    kept = _keep(flags, outcome, scores, verdicts, gone=len(pictures) - len(pairs), finished=not complaint)
    print(kept)
    if complaint:
        raise InputError(complaint)
    return 0


def failing(record: dict[str, Any], flags: argparse.Namespace) -> str | None:
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


def _reopen(manifest: Path) -> None:
    """Mark what an earlier run kept as unfinished until this one has chosen anew."""
    if manifest.is_file():
        with suppress(DatasetError):  # a damaged one is written anew at the end
            content = read_json(manifest)
            if isinstance(content, dict):
                write_json(manifest, {**content, "finished": False})


def _score(flags: argparse.Namespace, pairs: list[dict[str, Any]], quadruples: dict[int, Quadruple]) -> Outcome:
    output = flags.shard.file(flags.out, SCORES)
    settings = {"clip": flags.clip, "person_model": flags.person_model, "dtype": flags.dtype}
    root = Path(flags.out)
    scorer: Any = None
    with ThreadPoolExecutor(flags.workers) as readers:

        def score(batch: list[dict[str, Any]]) -> list[dict[str, Any] | Dropped]:
            nonlocal scorer
            scorer = scorer or _scorer(flags)  # no model is loaded when only the thresholds are new
            paths = [(root / pair["left"], root / pair["right"]) for pair in batch]
            texts = [quadruples[pair["quadruple_id"]] for pair in batch]
            results = scorer.score(paths, [(text.caption_1, text.caption_2) for text in texts], readers)
            return [
                Dropped("a picture cannot be read", {"details": result})
                if isinstance(result, str)
                else {**pair, **asdict(result), "vlm": None}
                for pair, result in zip(batch, results, strict=True)
            ]

        notes = {"command": "fafa-syncpr filter", "shard": str(flags.shard)}
        return run_stage(
            pairs,
            in_batches(score, flags.batch_size),
            output,
            key=key_in(output),
            settings=settings,
            unit="pair",
            notes=notes,
        )


def _scorer(flags: argparse.Namespace) -> Any:
    from fafa.syncpr.scoring import PairScorer
    from fafa.syncpr.text_to_image import choose_dtype
    from tbps_common.run.device import choose_device, device_sentence

    device = choose_device(flags.device)
    dtype = choose_dtype(flags.dtype, device)
    print(device_sentence(flags.device, device, str(dtype).removeprefix("torch.")))
    return PairScorer(flags.clip, device, dtype, person_model=flags.person_model)


def _client(flags: argparse.Namespace) -> Any:
    from tbps_common.pipeline import ChatClient

    return ChatClient(
        flags.vlm_model,
        base_url=flags.vlm_base_url,
        api_key_env=flags.vlm_api_key_env,
        concurrency=flags.vlm_workers,
        timeout=flags.timeout,
        deadline=flags.deadline,
        max_retries=flags.max_retries,
        sampling={"temperature": 0.0, "max_tokens": flags.max_tokens},
    )


def _verdict_file(flags: argparse.Namespace) -> Path:
    return flags.shard.file(flags.out, VERDICTS)


def _ask(
    flags: argparse.Namespace, client: Any, pairs: list[dict[str, Any]], quadruples: dict[int, Quadruple]
) -> Outcome:
    """Put the questions about each pair that has no answer yet."""
    from fafa.syncpr.answers import read_verdict
    from tbps_common.pipeline.chat import Conversation, in_conversations

    root = Path(flags.out)
    pictures = {pair_key(pair): [root / pair[side] for side in ("left", "right")] for pair in pairs}

    async def converse(item: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
        text = quadruples[item["quadruple_id"]]
        urls = [data_url(path) for path in pictures[pair_key(item)]]
        messages = question_messages(text.caption_1, text.caption_2, urls)
        return {**item, "answers": await conversation.ask(messages, read_verdict)}

    path = _verdict_file(flags)
    outcome = run_stage(
        [{"quadruple_id": of, "variant": variant} for of, variant in pictures],  # type: ignore[misc]
        in_conversations(client, converse),
        path,
        key=key_in(path),
        settings={"model": flags.vlm_model, "prompt": QUESTION_PROMPT_MARK},
        notes={"server": client.server},
        order=pair_key,
        unit="pair",
    )
    print(outcome.sentence("pair"))
    return outcome


def data_url(path: Path) -> str:
    """The picture as the API takes it."""
    from tbps_common.images import read_image

    buffer = io.BytesIO()
    read_image(path).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read(path: Path, parts: dict[str, Callable[[Any], bool]]) -> list[dict[str, Any]]:
    """The records of a file of this stage, each of which has these parts in the form that they must have."""
    from tbps_common.pipeline.journal import read_json_lines

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
    from tbps_common.pipeline.journal import Journal

    with Journal(path) as journal:
        journal.rewrite(
            [
                {**record, "vlm": all(verdicts[pair_key(record)].values()) if pair_key(record) in verdicts else None}
                for record in journal.records
            ]
        )


def _keep(
    flags: argparse.Namespace,
    scored: Outcome,
    scores: list[dict[str, Any]],
    verdicts: dict[Any, dict[str, bool]],
    *,
    gone: int,
    finished: bool,
) -> str:
    """Write what passes, and what does not with the reason; returns a sentence."""
    from tbps_common.pipeline.journal import encode

    output = flags.shard.file(flags.out, KEPT)
    kept, dropped = [], []
    for record in scores:
        answers = verdicts.get(pair_key(record))
        record = {**record, "vlm": None if answers is None else all(answers.values())}
        reason = failing(record, flags)
        if reason is None and answers is not None:
            reason = next((_REASON_VLM[key] for key in QUESTION_KEYS if not answers[key]), None)
        if reason is None and flags.vlm_model and answers is None:
            reason = "no usable answer (VLM)"
        (kept if reason is None else dropped).append(record if reason is None else {**record, "reason": reason})
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
    write_text(output, b"".join(map(encode, kept)).decode())
    aside = Path(f"{output}{DROPPED_SUFFIX}")
    write_text(aside, b"".join(map(encode, dropped)).decode())
    items = scored.items + gone
    counts = {"items": items, "kept": len(kept), "dropped": dict(reasons)}
    write_json(manifest_path(output), {**manifest, **counts, "finished": finished})
    listed = "".join(f"\n  {count} dropped: {reason}" for reason, count in reasons.most_common())
    return f"{output}: {len(kept)} of {items} pairs kept{listed}"
