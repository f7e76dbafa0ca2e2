"""Validation on ITCPR during training: features of queries and gallery, then recalls and mAP in percent."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from fafa.data import GalleryDataset, QueryDataset
from fafa.evaluation import retrieval
from fafa.extraction import CacheBudget, Extractor, StateCache
from fafa.model.blip2 import Blip2FAFACPR
from fafa.transforms import Transform
from tbps_common.datasets import ITCPR
from tbps_common.run.distributed import Ranks, broadcast_object

logger = logging.getLogger("fafa.train")

COLUMNS = {"recall_at1": "R1", "recall_at5": "R5", "recall_at10": "R10", "mAP": "mAP"}
"""Name in the tables of a run -> name of the metric."""


class Validator:
    """Measures the model whenever it is called. The outputs of a frozen ViT are computed once, as far as they fit.

    Args:
        model: the model in training; it is put into evaluation mode for the length of a validation.
        itcpr: queries and gallery.
        transform: of the test images.
        clean: the caption processor.
        device: where to compute.
        ranks: processes that share the work.
        batch_size: images encoded at once.
        num_workers: processes that load images.
        cache_bytes: memory of this process for outputs of a frozen ViT.
        cache_folder: keep these outputs in files there instead of in memory.
        stop_requested: asked between batches.
    """

    def __init__(
        self,
        model: Blip2FAFACPR,
        itcpr: ITCPR,
        transform: Transform,
        *,
        clean: Callable[[str], str],
        device: torch.device,
        ranks: Ranks,
        batch_size: int,
        num_workers: int,
        cache_bytes: int,
        cache_folder: Path | None,
        stop_requested: Callable[[], bool],
    ):
        query, gallery = itcpr.query, itcpr.gallery
        self.queries = QueryDataset(query["instance_ids"], query["img_paths"], query["captions"], transform)
        self.gallery = GalleryDataset(gallery["instance_ids"], gallery["img_paths"], transform)
        self._model, self._ranks = model, ranks
        self._extractor = Extractor(
            model, device, clean, batch_size, num_workers, ranks, stop_requested=stop_requested, progress=True
        )
        frozen = model.settings.freeze_vit
        budget = CacheBudget(cache_bytes if frozen else 0, cache_folder)
        self._query_cache = StateCache(budget, f"query{ranks.rank}") if budget.left else None
        self._gallery_cache = StateCache(budget, f"gallery{ranks.rank}") if budget.left else None

    def __call__(self) -> dict[str, float]:
        """Measure; every process must call it.

        Returns:
            `recall_at1`, `recall_at5`, `recall_at10`, `mAP` in percent, on every process.

        Raises:
            ExtractionStopped: the run was asked to stop meanwhile.
            DatasetError: an image cannot be read.
        """
        captions = self.queries.captions
        queries = self._extractor.queries(self.queries, captions, self._query_cache)
        gallery = self._extractor.gallery(self.gallery, self._gallery_cache)
        measured = None
        if self._ranks.is_main:
            ids = torch.as_tensor(self.queries.instance_ids), torch.as_tensor(self.gallery.instance_ids)
            result = retrieval(queries, gallery, *ids, self._model.fda_k, soft=True, topk=0)
            logger.info("\n%s", result.table(task="com"))
            measured = {column: result.metrics[name] for column, name in COLUMNS.items()}
        measured = broadcast_object(measured)
        assert measured is not None
        return measured

    def close(self) -> None:
        """Give the caches back."""
        for cache in (self._query_cache, self._gallery_cache):
            if cache is not None:
                cache.close()
