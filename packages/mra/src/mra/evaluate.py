"""Evaluation of a split: similarities, re-ranking by matching, metrics of both, on one process or shared by many.

The split is cut into the same batches of captions and images whatever the number of processes. Each process encodes
consecutive batches, compares all captions with its own images, and judges the pairs of its own images; so the results are
the same, to the last bit, and no process holds the features or tokens of another's images.
"""

import argparse
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from mra.config import CONFIG_NAME, evaluation_files, with_overrides, write_config
from mra.data.datasets import RetrievalTestDataset
from mra.model.network import Retrieval
from mra.model.weights import load_official
from mra.preflight import Annotation
from mra.published import PUBLISHED
from mra.report import SplitEvaluation, write_reports
from mra.retrieval.metrics import integer_ids, warn_of_missing
from mra.retrieval.rerank import SIMILARITY_WEIGHT, Matcher, Pairs
from mra.text.tokens import build_tokenizer, tokenize
from tbps_common.errors import CheckpointError, InputError
from tbps_common.ranking import evaluate_rows, rerank_rows, score_rows
from tbps_common.report.published import compare_with_published, published_report
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file
from tbps_common.run.device import allow_tf32
from tbps_common.run.distributed import Ranks, gather_rows
from tbps_common.run.progress import progress_bar
from tbps_common.run.randomness import seed_everything
from tbps_common.run.session import Run

logger = logging.getLogger("mra.evaluate")

# What is evaluated: pre-training on SDA is judged by CUHK-PEDES.
DATA_SETS = {"sda": "CUHK-PEDES", "cuhk": "CUHK-PEDES", "icfg": "ICFG-PEDES", "rstp": "RSTPReid"}

# Share of the free memory of a GPU that image tokens may take; beyond it they wait in host memory.
_MEMORY_SHARE = 0.4
_CMC_RANKS = 50
_SHOWN_IMAGES = 10
# What of a configuration makes the network and the form of its inputs; the other keys belong to the data.
_NETWORK_KEYS = ("vision_config", "text_config", "embed_dim", "itc_dop", "max_tokens")
_NETWORK_KEYS += ("h", "w", "image_res", "patch_size", "window_size")


def evaluate(config: dict[str, Any], args: argparse.Namespace, run: Run, annotation: Annotation) -> int:
    """`--evaluate`: print the tables of the validation and the test split, with the weights of a checkpoint.

    Writes `config.yaml` and, with `--report`, the files of `write_reports`; those of a checkpoint of another data set
    (zero-shot) into the folder `zero_shot_<task>` of `--output_dir`, so that no file of a training is replaced.

    Args:
        config: configuration of the task, without the flags.
        args: flags of `Retrieval.py`, checked by `mra.preflight.check_run`.
        run: this process.
        annotation: as far as it has been read.

    Returns:
        Exit status: 0; 1 if the result is not what `--require_published` asks for; 130 or 143 after an interruption.

    Raises:
        InputError: data, weights or checkpoint cannot be used.
    """
    seed_everything(args.seed + run.ranks.rank)
    allow_tf32(args.tf32)
    settings, folder = with_overrides(config, args), Path(args.output_dir)
    tokenizer = build_tokenizer(settings["text_encoder"])
    state, beside = find_state_dict(
        load_checkpoint_file(args.checkpoint, trust=args.trust_checkpoint), source=args.checkpoint
    )
    stored = beside.get("config")
    trained_with: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
    model, settings = _build_trained(state, args.checkpoint, settings, trained_with)
    model.to(run.device).eval()
    splits = {
        name: RetrievalTestDataset(file, settings, data=annotation.splits.get(name))
        for name, file in evaluation_files(settings).items()
    }
    trained_on = trained_with.get("test_file")
    if isinstance(trained_on, str) and Path(trained_on).name != Path(settings["test_file"]).name:
        folder = folder / f"zero_shot_{args.task}"
        logger.info("zero-shot: %s was trained for %s; files go to %s", args.checkpoint, trained_on, folder)
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / CONFIG_NAME, config)
    status, required = 0, args.require_published
    for name, dataset in splits.items():
        try:
            result = evaluate_split(
                model,
                dataset,
                tokenizer,
                settings,
                device=run.device,
                ranks=run.ranks,
                score_world=args.score_world,
                num_workers=args.num_workers,
                amp=args.amp_eval,
                stop=run.stop_requested,
                progress=True,
            )
        except EvaluationStopped:
            return run.exit_status
        published = compare_with_published(
            PUBLISHED,
            dataset=DATA_SETS[args.task],
            split=name,
            metrics={"t2i": result.itm.metrics},
            counts={"queries": result.queries, "gallery": result.gallery},
        )
        text, unmet = published_report(published, required if name == "test" else None)
        status |= unmet
        if run.is_main:
            print(f"### {name}_result:\n{result.itm.table()}", flush=True)
            if text:
                print(text, flush=True)
            if args.report:
                where = {"name": DATA_SETS[args.task], "split": name, "checkpoint": args.checkpoint}
                logger.info("wrote %s", ", ".join(map(str, write_reports(folder, result, dataset, **where))))
    return status


def _build_trained(
    state: Mapping[str, Tensor], name: str, settings: dict[str, Any], trained_with: Mapping[str, Any]
) -> tuple[Retrieval, dict[str, Any]]:
    """The network of a checkpoint: that of the task, or else the one that the checkpoint was trained with.

    Args:
        state: weights.
        name: of the checkpoint, for messages.
        settings: of the task.
        trained_with: configuration stored in the checkpoint; may be empty.

    Returns:
        The model, and the settings of the task for this model.

    Raises:
        CheckpointError: the weights fit neither.
    """

    def build(form: dict[str, Any]) -> Retrieval:
        model = Retrieval(form, init_backbones=False)
        load_official(model, state, name=name, strict=True)
        return model

    try:
        return build(settings), settings
    except CheckpointError as misfit:
        form = {key: value for key, value in settings.items() if key not in _NETWORK_KEYS}
        form |= {key: trained_with[key] for key in _NETWORK_KEYS if key in trained_with}
        if form == settings or not trained_with:
            raise
        try:
            model = build(form)
        except InputError:
            raise misfit from None
    changed = [key for key in _NETWORK_KEYS if form.get(key) != settings.get(key)]
    logger.warning("%s holds a network of another form (%s): it is used as it was trained", name, ", ".join(changed))
    return model, form


class EvaluationStopped(Exception):
    """The run was asked to stop while it evaluated."""


@torch.no_grad()
def evaluate_split(
    model: Retrieval,
    dataset: Any,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    score_world: int = 1,
    num_workers: int = 4,
    amp: bool = False,
    stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> SplitEvaluation:
    """Evaluate text-to-image retrieval (spec section 8). Every process of the group calls it.

    Args:
        model: the network on `device`; its mode is left as it was.
        dataset: the split (`mra.RetrievalTestDataset`).
        tokenizer: of `mra.build_tokenizer`.
        config: `batch_size_test`, `batch_size_test_text`, `k_test`, `max_tokens`, `test_hflip`.
        device: where to compute.
        ranks: this process among those that share the evaluation; by default it is the only one.
        score_world: number of processes whose released combination of scores is wanted, however many run.
        num_workers: processes that load images.
        amp: compute in bfloat16 autocast (faster; scores differ in the third decimal).
        stop: asked between batches, equally often on every process; must give the same answer on all of them.
        progress: show bars on stderr.

    Returns:
        The metrics, the same on every process.

    Raises:
        EvaluationStopped: `stop` said yes.
        DatasetError: an image cannot be read.
        ValueError: no caption has an image of its person, or a score is not finite.
    """
    started = time.perf_counter()
    share = _Share(ranks or Ranks(), device, amp, stop, progress)
    group = dist.group.WORLD if share.ranks.distributed else None
    was_training = model.training
    model.eval()
    try:
        texts = _encode_captions(model, dataset.text, tokenizer, config, share)
        gallery = _encode_own_images(model, dataset, config, num_workers, share)
        gallery_ids, query_ids = integer_ids(dataset.g_pids, dataset.q_pids)
        ids = query_ids, gallery_ids[gallery.first : gallery.first + len(gallery.features)]
        common: dict[str, Any] = {"max_rank": max(10, min(_CMC_RANKS, len(dataset))), "group": group}
        rows = score_rows(texts.features, gallery.features, device=device, group=group)
        itc = evaluate_rows(rows, *ids, topk=min(int(config["k_test"]), len(dataset)), on_missing="skip", **common)
        assert itc.indices is not None and itc.scores is not None
        logits = _judge(model, texts, gallery, itc.indices, share)
        fused = rerank_rows(
            rows,
            len(gallery.features),
            itc.indices.to(device),
            logits[0],
            itm_flip=logits[1] if len(logits) > 1 else None,
            weight=SIMILARITY_WEIGHT,
            legacy_world_size=score_world,
            group=group,
        )
        itm = evaluate_rows(fused, *ids, topk=_SHOWN_IMAGES, on_missing="skip", **common)
    finally:
        model.train(was_training)
    warn_of_missing(itm)
    return SplitEvaluation(
        itc=dataclasses.replace(
            itc, indices=itc.indices[:, :_SHOWN_IMAGES].clone(), scores=itc.scores[:, :_SHOWN_IMAGES].clone()
        ),
        itm=itm,
        queries=len(dataset.text),
        gallery=len(dataset),
        seconds=time.perf_counter() - started,
        settings={
            "k_test": int(config["k_test"]),
            "test_hflip": bool(config.get("test_hflip", False)),
            "score_world": score_world,
            "max_tokens": int(config["max_tokens"]),
            "batch_size_test": int(config["batch_size_test"]),
            "batch_size_test_text": int(config["batch_size_test_text"]),
            "precision": "bf16" if amp else "fp32",
        },
    )


@dataclass(frozen=True)
class _Share:
    """Which batches of a split this process computes, and how."""

    ranks: Ranks
    device: torch.device
    amp: bool
    stop: Callable[[], bool] | None
    progress: bool

    def bounds(self, batches: int) -> list[int]:
        """Process r computes the batches from `bounds[r]` to before `bounds[r + 1]`."""
        world = self.ranks.world_size
        return [-(-batches * rank // world) for rank in range(world + 1)]

    def own(self, batches: int, label: str) -> Iterator[int]:
        """Numbers of this process's batches; `stop` is asked before each, equally often on every process.

        Raises:
            EvaluationStopped: it said yes.
        """
        bounds = self.bounds(batches)
        own = range(bounds[self.ranks.rank], bounds[self.ranks.rank + 1])
        rounds = -(-batches // self.ranks.world_size)
        enabled = self.progress and self.ranks.is_main
        with progress_bar(rounds, unit="batch", desc=label, enabled=enabled) as bar:
            for number in range(rounds):
                if self.stop is not None and self.stop():
                    raise EvaluationStopped
                if number < len(own):
                    yield own[number]
                bar.update()

    def join(self, own: Tensor, rows: int, batch_size: int) -> Tensor:
        """The rows of all processes in order, from the rows of this one's batches."""
        if not self.ranks.distributed:
            return own
        bounds = [min(bound * batch_size, rows) for bound in self.bounds(-(-rows // batch_size))]
        sizes = [stop - start for start, stop in zip(bounds, bounds[1:])]
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = gather_rows(padded, sum_gradients=False).split(len(padded))
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


@dataclass(frozen=True)
class _Texts:
    """All captions: token embeddings cut to the longest one, mask, unit-norm features."""

    embeds: Tensor
    atts: Tensor
    features: Tensor


@dataclass(frozen=True)
class _OwnImages:
    """This process's images, which follow each other in the gallery.

    Attributes:
        batches: of all processes.
        first: position of the first one.
        features: `[own, D]`.
        tokens: of each batch; of the plain images, and of the mirrored ones if asked for.
    """

    batches: int
    first: int
    features: Tensor
    tokens: list[list[Tensor]]


def _encode_captions(
    model: Retrieval, captions: list[str], tokenizer: Any, config: Mapping[str, Any], share: _Share
) -> _Texts:
    batch_size = int(config["batch_size_test_text"])
    ids, atts = tokenize(tokenizer, captions, int(config["max_tokens"]))
    longest = int((torch.arange(1, atts.shape[1] + 1) * atts).max())
    batches = list(zip(ids.split(batch_size), atts.split(batch_size)))
    settings = model.settings
    embeds = [torch.empty(0, longest, settings.text.hidden_size, device=share.device)]
    features = [torch.empty(0, settings.embed_dim, device=share.device)]
    for number in share.own(len(batches), "captions"):
        ids_part, atts_part = (part.to(share.device, non_blocking=True) for part in batches[number])
        with share.autocast():
            encoded = model.get_text_embeds(ids_part, atts_part)
            features.append(normalize(model.get_text_feat(encoded).float(), dim=-1))
        # The padding is part of the feature, but nothing looks at it afterwards.
        embeds.append(encoded[:, :longest].float())
    return _Texts(
        embeds=share.join(torch.cat(embeds), len(captions), batch_size),
        atts=atts[:, :longest],
        features=share.join(torch.cat(features), len(captions), batch_size),
    )


def _encode_own_images(
    model: Retrieval, dataset: Any, config: Mapping[str, Any], num_workers: int, share: _Share
) -> _OwnImages:
    batch_size, mirrored = int(config["batch_size_test"]), bool(config.get("test_hflip", False))
    batches = [part.tolist() for part in torch.arange(len(dataset)).split(batch_size)]
    bounds = share.bounds(len(batches))
    own = batches[bounds[share.ranks.rank] : bounds[share.ranks.rank + 1]]
    loader = iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_sampler=own,
            num_workers=num_workers if own else 0,
            pin_memory=share.device.type == "cuda",
        )
    )
    sizes = model.settings.vision
    per_image = 4 * (1 + sizes.num_tokens) * sizes.feature_width * (2 if mirrored else 1)
    store = _token_store(share.device, per_image * batch_size * len(own))
    tokens: list[list[Tensor]] = [[] for _ in range(2 if mirrored else 1)]
    features = [torch.empty(0, model.settings.embed_dim, device=share.device)]
    for _ in share.own(len(batches), "images"):
        image, mirror, _ = next(loader)
        views = []
        for kept, view in zip(tokens, (image, mirror)):
            with share.autocast():
                embeds = model.get_vision_embeds(view.to(share.device, non_blocking=True))[0]
                views.append(normalize(model.get_image_feat(embeds).float(), dim=-1))
            kept.append(embeds.float().to(store))
        features.append((views[0] + views[1]) / 2 if mirrored else views[0])
    first = min(bounds[share.ranks.rank] * batch_size, len(dataset))
    return _OwnImages(len(batches), first, torch.cat(features), tokens)


def _token_store(device: torch.device, size: int) -> torch.device:
    if device.type != "cuda":
        return device
    return device if size < _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] else torch.device("cpu")


def _judge(model: Retrieval, texts: _Texts, gallery: _OwnImages, candidates: Tensor, share: _Share) -> list[Tensor]:
    """Matching logits `[Q, k]` of plain (and mirrored) images, complete on every process."""
    batches = iter(zip(*gallery.tokens))
    pairs, start = Pairs(candidates), gallery.first
    logits = [torch.zeros(candidates.numel(), device=share.device) for _ in gallery.tokens]
    with share.autocast():
        matcher = Matcher(model, texts.embeds, texts.atts)
    for _ in share.own(gallery.batches, "re-ranking"):
        views = next(batches)
        stop = start + len(views[0])
        positions, images, queries = pairs.of_images(start, stop)
        for scores, tokens in zip(logits, views):
            with share.autocast():
                scores[positions.to(share.device, non_blocking=True)] = matcher.logits(tokens, images, queries)
        start = stop
    if share.ranks.distributed:
        for scores in logits:
            # Every pair was judged by one process and is 0 on the others, so the sum is exact.
            dist.all_reduce(scores)
    return [scores.view(candidates.shape) for scores in logits]
