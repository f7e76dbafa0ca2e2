"""Scores of pairs against float64, the selection network, precision settings and the memory a score takes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tbps_common.ranking import retrieve, score_rows, similarity
from tbps_common.ranking.selection_network import selection_network

TOKEN_FORMS = ["topk_mean", "max", "mean", "logsumexp"]
ATTRIBUTE_FORMS = ["attr_avg", "attr_max", "attr_min", "attr_lsp_max", "attr_lsp_min"]


def naive(query, gallery, reduce, k):
    """The score of every pair in float64, from all inner products."""
    query, gallery = query.double(), gallery.double()
    if reduce == "dot":
        return query @ gallery.t()
    if reduce in TOKEN_FORMS:
        products = torch.einsum("qd,gtd->qgt", query, gallery)
        if reduce == "topk_mean":
            return products.sort(dim=2, descending=True).values[:, :, :k].mean(dim=2)
        return {"max": products.amax(2), "mean": products.mean(2), "logsumexp": products.logsumexp(2)}[reduce]
    units = [x / x.norm(dim=2, keepdim=True).clamp(min=1e-8) for x in (query, gallery)]
    cosine = torch.einsum("qkc,gkc->qgk", *units)
    return {
        "attr_avg": cosine.mean(2),
        "attr_max": cosine.amax(2),
        "attr_min": cosine.amin(2),
        "attr_lsp_max": cosine.exp().sum(2).log(),
        "attr_lsp_min": -(-cosine).exp().sum(2).log(),
    }[reduce]


def features(generator, reduce, queries, images, tokens, width, dtype):
    """Unit features; the last attribute of the last image is all zero."""
    per_image = () if reduce == "dot" else (tokens,)
    per_query = (tokens,) if reduce in ATTRIBUTE_FORMS else ()
    query = torch.randn(queries, *per_query, width, generator=generator, dtype=torch.float64)
    gallery = torch.randn(images, *per_image, width, generator=generator, dtype=torch.float64)
    query, gallery = (torch.nn.functional.normalize(x, dim=-1) for x in (query, gallery))
    if reduce in ATTRIBUTE_FORMS:
        gallery[-1, -1] = 0
    return query.to(dtype), gallery.to(dtype)


@pytest.mark.parametrize("reduce", ["dot", *TOKEN_FORMS, *ATTRIBUTE_FORMS])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)),
    k=st.integers(1, 45),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_scores_equal_float64(reduce, seed, sizes, k, dtype):
    query, gallery = features(torch.Generator().manual_seed(seed), reduce, *sizes, dtype)
    scores = similarity(query, gallery, reduce=reduce, k=k)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # inner products of unit vectors in float32: the rounding of up to 40 additions of numbers below 4
    bound = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(scores.double(), naive(query, gallery, reduce, k), rtol=0, atol=bound)


@pytest.mark.parametrize("reduce", ["dot", "topk_mean", "logsumexp", "attr_avg", "attr_min"])
def test_tiles_join_without_seams(reduce):
    # Sizes beyond one tile of queries and of images in every kind of reduction that cuts its work.
    generator = torch.Generator().manual_seed(1)
    tokens = 1 if reduce == "dot" else 4
    query, gallery = features(generator, reduce, 4500, 2300, tokens, 8, torch.float16)
    rows = score_rows(query, gallery, reduce=reduce, k=2)
    picked = rows(4090, 4100)
    torch.testing.assert_close(picked.double(), naive(query[4090:4100], gallery, reduce, 2), rtol=0, atol=3e-6)
    torch.testing.assert_close(rows(0, 4500)[4090:4100], picked, rtol=0, atol=3e-6)


@pytest.mark.parametrize("reduce", ["dot", *TOKEN_FORMS, *ATTRIBUTE_FORMS])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 70), st.integers(2, 130), st.integers(1, 9), st.integers(1, 70)),
    threads=st.integers(1, 3),
)
def test_equal_pictures_get_equal_scores(reduce, seed, sizes, threads):
    generator = torch.Generator().manual_seed(seed)
    query, gallery = features(generator, reduce, *sizes, torch.float32)
    copies = torch.randperm(len(gallery), generator=generator)[: 1 + len(gallery) // 2]
    gallery[copies] = gallery[copies[0]].clone()
    torch.set_num_threads(threads)
    try:
        rows = score_rows(query, gallery, reduce=reduce, k=3)
        scores = rows(0, len(query))
        assert bool((scores[:, copies] == scores[:, copies[:1]]).all())
        # and the score of a pair does not depend on what else is scored: no other result for another row budget
        assert all(torch.equal(rows(place, place + 1)[0], scores[place]) for place in range(0, len(query), 7))
        part = gallery[: 1 + len(gallery) // 3]
        assert torch.equal(similarity(query, part, reduce=reduce, k=3), scores[:, : len(part)])
    finally:
        torch.set_num_threads(1)


def test_the_first_of_equal_pictures_is_found_by_one_query_alone():
    for seed in range(100):
        gallery = torch.nn.functional.normalize(
            torch.randn(10, 64, generator=torch.Generator().manual_seed(seed)), dim=1
        )
        gallery[9] = gallery[0]
        result = retrieve(gallery[:1], gallery, [0], range(10))
        assert result.first_rank.tolist() == [1] and result.indices[0, :2].tolist() == [0, 9]


@settings(max_examples=80, deadline=None)
@given(tokens=st.integers(1, 70), data=st.data(), seed=st.integers(0, 2**31))
def test_selection_network(tokens, data, seed):
    k = data.draw(st.integers(1, tokens))
    network = selection_network(tokens, k)
    values = np.random.default_rng(seed).normal(size=(tokens, 11)).round(1)
    for library, maximum, minimum in (
        (np.asarray, np.maximum, np.minimum),
        (torch.tensor, torch.maximum, torch.minimum),
    ):
        scratch = library(np.concatenate([values, np.full((network.slabs - tokens, 11), np.nan)]))
        total = np.asarray(network.sum_of_largest(scratch, maximum, minimum))
        np.testing.assert_allclose(total, np.sort(values, axis=0)[-k:].sum(axis=0), atol=1e-12)


@pytest.mark.parametrize("k", [3, 5, 6, 8])
def test_selection_network_by_the_zero_one_principle(k):
    # A network of minima and maxima that is right for all inputs of zeros and ones is right for all inputs.
    network = selection_network(16, k)
    values = np.array(list(itertools.product([0.0, 1.0], repeat=16))).T
    scratch = np.concatenate([values, np.zeros((network.slabs - 16, values.shape[1]))])
    total = network.sum_of_largest(scratch, np.maximum, np.minimum)
    np.testing.assert_array_equal(total, np.minimum(values.sum(axis=0), k))


def test_network_for_six_of_thirty_two_is_small():
    compared = 0

    def counted(function):
        def call(a, b, out):
            nonlocal compared
            compared += out.size
            return function(a, b, out=out)

        return call

    network = selection_network(32, 6)
    network.sum_of_largest(np.zeros((network.slabs, 10)), counted(np.maximum), counted(np.minimum))
    assert compared <= 10 * 210  # a naive sort needs 31 * 32 / 2 = 496 comparisons of each of the 10 pairs


def test_features_are_not_changed():
    query, gallery = features(torch.Generator().manual_seed(2), "topk_mean", 5, 6, 9, 4, torch.float32)
    before = query.clone(), gallery.clone()
    for reduce in TOKEN_FORMS:
        similarity(query, gallery, reduce=reduce, k=3)
    attributes = gallery[:4].clone()
    similarity(attributes, gallery, reduce="attr_avg")
    assert torch.equal(query, before[0]) and torch.equal(gallery, before[1])
    assert torch.equal(attributes, before[1][:4])


def test_bfloat16_rounds_the_operands_only():
    query, gallery = features(torch.Generator().manual_seed(3), "dot", 7, 9, 1, 64, torch.float32)
    scores = score_rows(query, gallery, precision="bfloat16")(0, 7)
    assert scores.dtype == torch.float32
    rounded = naive(query.bfloat16(), gallery.bfloat16(), "dot", 1)
    torch.testing.assert_close(scores.double(), rounded, rtol=0, atol=1e-6)
    assert (scores - similarity(query, gallery)).abs().max() > 1e-5


def matmul_settings():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_tf32_is_off_during_the_call_and_then_as_before(monkeypatch):
    query, gallery = features(torch.Generator().manual_seed(4), "dot", 3, 4, 1, 8, torch.float32)
    seen = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (seen.append(matmul_settings()), product(*a, **k))[1])
    original = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        chosen = matmul_settings()
        similarity(query, gallery)
        score_rows(query, gallery, precision="tf32")(0, 3)
        assert seen == [("ieee", "ieee"), ("tf32", "tf32")]
        monkeypatch.setattr(torch, "mm", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            similarity(query, gallery)
        assert matmul_settings() == chosen
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(original)


def test_autocast_and_gradients_stay_outside():
    query, gallery = features(torch.Generator().manual_seed(5), "topk_mean", 3, 4, 9, 32, torch.float32)
    expected = similarity(query, gallery, reduce="topk_mean", k=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = similarity(query.requires_grad_(), gallery.requires_grad_(), reduce="topk_mean", k=3)
    assert not scores.requires_grad
    assert torch.equal(scores, expected)


def test_rows_are_asked_for_within_the_queries():
    rows = score_rows(torch.eye(3), torch.eye(3))
    assert rows(1, 1).shape == (0, 3)
    for start, stop in ((-1, 2), (0, 4), (2, 1)):
        with pytest.raises(IndexError, match="not within 0 to 3"):
            rows(start, stop)


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest tensor that any torch operation inside the context has made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("reduce", ["dot", "topk_mean", "max", "mean", "logsumexp", "attr_avg", "attr_max"])
def test_a_memory_mapped_gallery_is_never_copied_whole(reduce, tmp_path):
    generator = torch.Generator().manual_seed(6)
    # 80 MB in half precision, 160 MB once raised to float32: ten tiles.
    shape = (80_000, 512) if reduce == "dot" else (20_000, 4, 512)
    stored = torch.from_file(str(tmp_path / "gallery"), shared=True, size=40_960_000, dtype=torch.float16).view(shape)
    stored.copy_(torch.randn(1000, 512, generator=generator).half().repeat(40_960_000 // 512_000, 1).view(shape))
    query = torch.randn(8, 512, generator=generator)
    if reduce.startswith("attr"):
        query = torch.randn(8, 4, 512, generator=generator)
    ids = torch.arange(len(stored)) % 1000
    with LargestAllocation() as largest:
        retrieve(query, stored, torch.arange(8), ids, reduce=reduce, k=2, row_budget=1 << 22)
    assert 0 < largest.bytes <= 17 << 20
