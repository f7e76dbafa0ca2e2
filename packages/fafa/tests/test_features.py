"""Features of data sets: the cache of a frozen ViT's outputs changes the work, never the numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fafa.evaluation import compute_itcpr_val_metrics
from fafa.features import CacheBudget, ExtractionStopped, Extractor, StateCache
from fafa.model import Blip2FAFACPR, read_model_config
from tbps_world.tiny.fafa import TINY_MODEL, WORDS, write_tiny_model

IMAGES = 11
STATE_BYTES = 4 * 5 * 32  # (28 / 14)^2 + 1 tokens of width 32 in float32


class Pictures:
    """Items `(id, image)` that count how often they are loaded."""

    def __init__(self, count: int = IMAGES):
        self.images = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(1))
        self.captions = ["red coat"] * count
        self.instance_ids = list(range(count))
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        self.loaded += 1
        return index, self.images[index]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Blip2FAFACPR:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny"), TINY_MODEL, WORDS)
    torch.manual_seed(0)
    return Blip2FAFACPR.from_config(read_model_config(path)).train()


def extractor(model: Blip2FAFACPR, **more: Any) -> Extractor:
    return Extractor(model, batch_size=4, num_workers=0, **more)


def test_features_are_those_of_the_model(model: Blip2FAFACPR) -> None:
    pictures = Pictures()
    captions = [f"{'red' if place % 2 else 'blue'} coat" for place in range(IMAGES)]
    gallery = extractor(model).gallery(pictures)
    queries = extractor(model, clean=str.upper).queries(pictures, captions)
    assert model.training  # left as it was
    model.eval()
    expected = model.extract_target_features(pictures.images)[0]
    upper = [caption.upper() for caption in captions]
    samples = {"image": pictures.images, "text_input": upper}
    torch.testing.assert_close(gallery, expected, rtol=1e-4, atol=1e-5)
    embeds = model.extract_features(samples).multimodal_embeds
    model.train()
    assert embeds is not None
    torch.testing.assert_close(queries, embeds, rtol=1e-4, atol=1e-5)
    assert not gallery.requires_grad


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(0, 0), (3 * STATE_BYTES, 0), (4 * STATE_BYTES, 4), (10 * STATE_BYTES, 8), (10**9, IMAGES)],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_cache_keeps_whole_batches_up_to_its_limit(
    limit: int, kept: int, on_disk: bool, model: Blip2FAFACPR, tmp_path: Path
) -> None:
    expected = extractor(model).gallery(Pictures())
    budget = CacheBudget(limit, tmp_path / "cache" if on_disk else None)
    cache, pictures = StateCache(budget), Pictures()
    for repeat in range(3):
        assert torch.equal(extractor(model).gallery(pictures, cache), expected)
        assert pictures.loaded == IMAGES + repeat * (IMAGES - kept)
    assert cache.filled == kept
    assert budget.left == limit - kept * STATE_BYTES
    cache.close()
    assert not on_disk or not list((tmp_path / "cache").glob(".*") if (tmp_path / "cache").exists() else [])


def test_caches_share_a_budget(model: Blip2FAFACPR) -> None:
    budget = CacheBudget(14 * STATE_BYTES)
    first, second = StateCache(budget), StateCache(budget)
    extractor(model).gallery(Pictures(8), first)
    extractor(model).gallery(Pictures(8), second)
    assert (first.filled, second.filled) == (8, 4)


def test_trained_parts_are_never_cached(model: Blip2FAFACPR) -> None:
    """The cache lies before `ln_vision`, which training changes."""
    cache, pictures = StateCache(CacheBudget(10**9)), Pictures()
    before = extractor(model).gallery(pictures, cache)
    with torch.no_grad():
        model.ln_vision.weight.mul_(1.5)
    after = extractor(model).gallery(pictures, cache)
    assert torch.equal(after, extractor(model).gallery(Pictures()))
    assert not torch.equal(after, before)


class Downloads(TorchFunctionMode):
    """Notes which tensors are brought to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # On this machine the model's own device is the CPU; a move that ends there anywhere says so by name.
        to_cpu = func is torch.Tensor.to and any(value == "cpu" and isinstance(value, str) for value in args[1:])
        if (func in (torch.Tensor.cpu, torch.Tensor.numpy) or to_cpu) and args[0].is_floating_point():
            self.shapes.append(args[0].shape)
        return func(*args, **kwargs)


def test_features_are_ranked_where_the_model_is(model: Blip2FAFACPR, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the gallery's nor the queries' features go to the CPU; only results of the ranking do."""
    pictures = Pictures()
    with Downloads() as downloads:
        compute_itcpr_val_metrics(model, pictures, pictures, {"eval": str}, soft=True, batch_size=4, num_workers=0)
    assert "R1" in capsys.readouterr().out
    assert downloads.shapes  # metrics are computed on the host
    width = model.settings.embed_dim
    assert not [shape for shape in downloads.shapes if shape and shape[-1] == width], downloads.shapes


def test_a_stop_is_heard_between_batches(model: Blip2FAFACPR) -> None:
    asked = iter([False, False, True])
    pictures = Pictures()
    with pytest.raises(ExtractionStopped):
        extractor(model, stop_requested=lambda: next(asked)).gallery(pictures)
    assert pictures.loaded < 13
    assert model.training
