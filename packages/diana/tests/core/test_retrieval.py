"""Encoding and evaluation: stored scores, the shared pass over all dialogue lengths, and what goes wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diana import DiaNAModel
from diana.data import build_eval_transform, load_annotations, render_dialogue
from diana.metrics import metric_eval
from diana.retrieval import encode_dialogues, encode_images, encode_turns, evaluate, score_rows_of
from diana.retrieval.dialogues import prefix_trees
from diana.retrieval.scores import Features
from diana.similarity import SIM_TYPES, attribute_similarity
from diana.tokenizer import encode, load_tokenizer
from tbps_common.errors import DatasetError, InputError

Make = Callable[..., DiaNAModel]
MEAN, STD = [0.39, 0.37, 0.35], [0.24, 0.24, 0.23]
ANSWERS = ("A man in a red coat.", "Yes, black shoes!", "no bag", "grey (jeans) \n", "his coat was blue")


def dialogue(start: int, rounds: int) -> list[list[dict[str, str]]]:
    return [
        [
            {"from": "gpt", "value": f"What about {number}?"},
            {"from": "user", "value": ANSWERS[(start + number) % len(ANSWERS)]},
        ]
        for number in range(rounds)
    ]


@pytest.fixture
def meta(picture_folder: Path, tmp_path: Path) -> dict[str, Any]:
    records = [
        {
            "id": number // 2,
            "file_path": f"p{number}.png",
            "chats": [dialogue(number, 1 + number % 4), dialogue(number, 3)],
        }
        for number in range(6)
    ]
    (tmp_path / "test.json").write_text(json.dumps(records), encoding="utf-8")
    return {"mean": MEAN, "std": STD, "image_root": str(picture_folder), "test_annotation": str(tmp_path / "test.json")}


def gallery_of(model: DiaNAModel, paths: list[str], size: Any, mean: list[float], std: list[float]) -> Features:
    transform = build_eval_transform(size, mean, std)
    batches = list(encode_images(model, paths, transform, batch_size=4, attributes=True))
    return Features(torch.cat([embeds for _, embeds, _ in batches]), torch.cat([attrs for *_, attrs in batches]))


@pytest.mark.golden("diana", kind="retrieval")
def test_stored_evaluation(golden: Any, golden_name: str, golden_model: Any, tmp_path: Path) -> None:
    case = golden(golden_name)
    settings, expected = case.case, case.tensors("expected.safetensors")
    tolerance, limits = settings["tolerance"], settings["turn_limits"]
    model = golden_model(golden(Path(settings["weights"]).parent.name))
    tokenizer = load_tokenizer((case.folder / settings["tokenizer"]).resolve())
    stored = settings["meta"]
    meta = {
        **stored,
        "image_root": str(case.folder / stored["image_root"]),
        "test_annotation": str(case.folder / stored["test_annotation"]),
    }
    view = load_annotations(meta, "test")
    labels = settings["labels"]
    assert view["image_ids"] == labels["image_ids"] and view["caption_ids"] == labels["caption_ids"]
    assert [render_dialogue(chat) for chat in view["chats"]] == labels["captions"]
    assert view["images"] == [str(case.folder / stored["image_root"] / name) for name in labels["images"]]

    gallery = gallery_of(model, view["images"], settings["image_size"], stored["mean"], stored["std"])
    for limit in limits:
        texts = [render_dialogue(chat, limit) for chat in view["chats"]]
        queries = Features(
            *encode_dialogues(model, tokenizer, texts, max_seq_length=settings["max_seq_length"], attributes=True)
        )
        for name, rows in score_rows_of(queries, gallery, mode="all").items():
            torch.testing.assert_close(rows(0, len(texts)), expected[f"{name}_{limit}"], **tolerance)
    results = evaluate(
        model, tokenizer, meta, turn_limits=limits, mode="all", max_seq_length=settings["max_seq_length"], batch_size=4
    )
    for result in results:
        for name, metrics in settings["metrics"][str(result.turn_limit)].items():
            assert result.metrics[name] == pytest.approx(metrics, rel=tolerance["rtol"], abs=tolerance["atol"])


def one_by_one(model: DiaNAModel, tokenizer: Any, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every text alone, padded to the limit, through the public encoders."""
    embeds, attrs = [], []
    with torch.no_grad():
        for text in texts:
            tokens = encode(tokenizer, [text], length)
            one, dense = model.encode_text(**tokens)
            embeds.append(F.normalize(one, dim=-1))
            attrs.append(F.normalize(model.refine(dense, tokens["attention_mask"]), dim=-1))
    return torch.cat(embeds), torch.cat(attrs)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("pad_to_max", [False, True])
@pytest.mark.parametrize("length", [400, 130])
def test_all_lengths_in_one_pass_equal_every_text_alone(
    tiny_model: Make, tokenizer: Any, kernel: str, pad_to_max: bool, length: int
) -> None:
    model = tiny_model()
    model.set_attention(kernel)
    chats = [dialogue(start, rounds) for start, rounds in ((0, 4), (1, 1), (2, 3), (3, 4), (4, 2))]
    versions = [[render_dialogue(chat, limit) for limit in (1, -1, 2, 3)] for chat in chats]
    trees = prefix_trees(tokenizer, versions, length)
    assert length < 400 or sum(len(own) > 0 for tree in trees for _, own in tree.branches) >= 3
    found = encode_turns(
        model,
        tokenizer,
        versions,
        max_seq_length=length,
        batch_size=3,
        attributes=True,
        pad_to_max=pad_to_max,
    )
    assert len(found) == 4
    for number, (embeds, attrs) in enumerate(found):
        expected = one_by_one(model, tokenizer, [texts[number] for texts in versions], length)
        assert torch.allclose(embeds, expected[0], atol=2e-5) and torch.allclose(attrs, expected[1], atol=2e-5)


def test_versions_that_share_nothing_and_prefixes(tiny_model: Make, tokenizer: Any) -> None:
    model = tiny_model()
    versions = [["a red coat", "zebra", "a red"], ["bag", "bag", "bag bag bag bag"]]
    found = encode_turns(model, tokenizer, versions, max_seq_length=50, attributes=True)
    for number, (embeds, attrs) in enumerate(found):
        expected = one_by_one(model, tokenizer, [texts[number] for texts in versions], 50)
        assert torch.allclose(embeds, expected[0], atol=2e-5) and torch.allclose(attrs, expected[1], atol=2e-5)


def test_the_shared_pass_runs_fewer_tokens(tiny_model: Make, tokenizer: Any) -> None:
    model, seen = tiny_model(), []
    model.llama.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    versions = [[render_dialogue(dialogue(start, 5), limit) for limit in (1, 2, 3, 4, 5)] for start in range(4)]
    encode_turns(model, tokenizer, versions, max_seq_length=600)
    together = sum(seen)
    seen.clear()
    for number in range(5):
        encode_dialogues(model, tokenizer, [texts[number] for texts in versions], max_seq_length=600)
    assert together < 0.4 * sum(seen)


def test_order_and_batches_do_not_matter(tiny_model: Make, tokenizer: Any) -> None:
    model = tiny_model()
    texts = [render_dialogue(dialogue(start, 1 + start % 4)) for start in range(9)]
    whole, attrs = encode_dialogues(model, tokenizer, texts, max_seq_length=400, attributes=True)
    for batch_size in (1, 2, 5):
        embeds, none = encode_dialogues(model, tokenizer, texts, max_seq_length=400, batch_size=batch_size)
        assert none is None and torch.allclose(embeds, whole, atol=1e-5)
    back = encode_dialogues(model, tokenizer, texts[::-1], max_seq_length=400, attributes=True)
    assert torch.allclose(back[0].flip(0), whole, atol=1e-5) and torch.allclose(back[1].flip(0), attrs, atol=1e-5)
    assert torch.allclose(whole.norm(dim=-1), torch.ones(9)) and whole.dtype == torch.float32


def test_cut_texts_are_told_once(tiny_model: Make, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts = [render_dialogue(dialogue(0, 4)), "bag"]
    encode_dialogues(tiny_model(), tokenizer, texts, max_seq_length=60)
    assert len(caplog.records) == 1 and "1 of 2 texts are longer than 60 tokens" in caplog.text


def test_a_batch_that_does_not_fit_is_halved(
    tiny_model: Make, tokenizer: Any, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    texts = [render_dialogue(dialogue(start, 2)) for start in range(5)]
    paths = sorted(map(str, picture_folder.iterdir()))
    expected = encode_dialogues(model, tokenizer, texts, max_seq_length=300)[0]
    pictures = gallery_of(model, paths, (64, 32), MEAN, STD)
    tried = []

    def limited(encode: Any) -> Any:
        def run(values: torch.Tensor, *rest: Any, **options: Any) -> Any:
            tried.append(len(values))
            if len(values) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(values, *rest, **options)

        return run

    monkeypatch.setattr(model, "encode_text", limited(model.encode_text))
    monkeypatch.setattr(model, "encode_image", limited(model.encode_image))
    assert torch.allclose(encode_dialogues(model, tokenizer, texts, max_seq_length=300)[0], expected, atol=1e-5)
    assert torch.allclose(gallery_of(model, paths, (64, 32), MEAN, STD).attributes, pictures.attributes, atol=1e-5)
    assert tried[0] == 5 and max(tried[1:3]) <= 3 and 4 in tried
    monkeypatch.setattr(model, "encode_text", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        encode_dialogues(model, tokenizer, texts, max_seq_length=300)


def test_evaluation_equals_the_definition(tiny_model: Make, tokenizer: Any, meta: dict[str, Any]) -> None:
    model = tiny_model(refiner_config={"sim_type": "lsp_max"}).train()
    results = evaluate(
        model,
        tokenizer,
        meta,
        turn_limits=[2, -1],
        mode="all",
        max_seq_length=400,
        batch_size=4,
        text_batch_size=5,
        topk=3,
    )
    assert model.training
    model.eval()
    view = load_annotations(meta, "test")
    gallery = gallery_of(model, view["images"], (64, 32), MEAN, STD)
    for result, limit in zip(results, (2, -1), strict=True):
        texts = [render_dialogue(chat, limit) for chat in view["chats"]]
        embeds, attrs = one_by_one(model, tokenizer, texts, 400)
        one = embeds @ gallery.embeds.t()
        two = attribute_similarity(attrs, gallery.attributes, "lsp_max")
        for name, sim in (("global", one), ("local", two), ("all", one + two)):
            assert result.metrics[name] == pytest.approx(metric_eval(sim, view["image_ids"], view["caption_ids"]))
            assert result.results[name].indices.shape == (12, 3)
        assert (result.turn_limit, result.num_images, result.num_ids) == (limit, 6, 3)
        assert (result.num_queries, result.num_skipped) == (12, 0)
        assert result.queries == texts and result.paths == view["images"] and result.caption_ids == view["caption_ids"]


def test_modes(tiny_model: Make, tokenizer: Any, meta: dict[str, Any]) -> None:
    rows = {"global": ["global"], "local": ["global", "local"], "all": ["global", "local", "all"]}
    model = tiny_model()
    for mode, names in rows.items():
        assert list(evaluate(model, tokenizer, meta, mode=mode)[0].metrics) == names
    without = tiny_model(refiner_config={"enable_refiner": False})
    assert list(evaluate(without, tokenizer, meta)[0].metrics) == ["global"]
    with pytest.raises(InputError, match="--mode local needs an attribute refiner"):
        evaluate(without, tokenizer, meta, mode="local")
    with pytest.raises(InputError, match="--mode"):
        evaluate(model, tokenizer, meta, mode="every")


@pytest.mark.parametrize("sim_type", SIM_TYPES)
def test_native_precision_compares_in_the_models_dtype(
    tiny_model: Make, tokenizer: Any, meta: dict[str, Any], sim_type: str
) -> None:
    model = tiny_model(refiner_config={"sim_type": sim_type}).to(torch.bfloat16)
    view = load_annotations(meta, "test")
    texts = [render_dialogue(chat) for chat in view["chats"]]
    transform = build_eval_transform((64, 32), MEAN, STD)
    reference: dict[str, torch.Tensor] = {}
    for sim_dtype, dtype in (("fp32", torch.float32), ("native", torch.bfloat16)):
        [(_, embeds, attrs)] = encode_images(
            model, view["images"], transform, batch_size=9, attributes=True, sim_dtype=sim_dtype
        )
        queries = encode_dialogues(model, tokenizer, texts, max_seq_length=400, attributes=True, sim_dtype=sim_dtype)
        assert embeds.dtype == attrs.dtype == queries[0].dtype == dtype
        rows = score_rows_of(
            Features(*queries), Features(embeds, attrs), mode="all", sim_type=sim_type, sim_dtype=sim_dtype
        )
        scores = {name: scorer(0, 12).float() for name, scorer in rows.items()}
        assert torch.allclose(scores["all"], scores["global"] + scores["local"], atol=0.02)
        reference = reference or scores
        assert all(torch.allclose(scores[name], reference[name], atol=0.05) for name in scores)
    assert evaluate(model, tokenizer, meta, mode="all", sim_dtype="native")[0].num_queries == 12


def test_unreadable_images(tiny_model: Make, picture_folder: Path) -> None:
    model, transform = tiny_model(), build_eval_transform((64, 32), MEAN, STD)
    paths = sorted(map(str, picture_folder.iterdir()))
    (picture_folder / "p2.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="p2.png") as caught:
        list(encode_images(model, paths, transform, batch_size=4))
    assert "\n" not in str(caught.value)


def test_a_missing_image_is_told_before_anything_is_encoded(
    tiny_model: Make, tokenizer: Any, meta: dict[str, Any], picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    monkeypatch.setattr(model, "encode_image", None)
    (picture_folder / "p4.png").unlink()
    with pytest.raises(DatasetError, match=r"p4.png.*image_root"):
        evaluate(model, tokenizer, meta)


def test_nothing_to_encode(tiny_model: Make, tokenizer: Any, meta: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model()
    for versions in ([], [["a"], ["b", "c"]]):
        with pytest.raises(InputError, match="equally many versions"):
            encode_turns(model, tokenizer, versions, max_seq_length=9)
    with pytest.raises(InputError, match="at least 1"):
        encode_dialogues(model, tokenizer, ["a"], max_seq_length=0)
    with pytest.raises(InputError, match="--turn_limit"):
        evaluate(model, tokenizer, meta, turn_limits=[])
    (tmp_path / "test.json").write_text('[{"id": 1, "file_path": "p0.png", "chats": []}]', encoding="utf-8")
    with pytest.raises(DatasetError, match="no dialogue"):
        evaluate(model, tokenizer, meta)
