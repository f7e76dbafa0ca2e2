"""Annotations, transforms, masking, training items and their batches."""

import json
import logging
import random
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diana.data import (
    PROMPT_POOL,
    Collate,
    build_eval_transform,
    build_train_transform,
    build_training_dataset,
    load_annotations,
    load_dataset_config,
    mask_token_ids,
    render_caption,
    render_dialogue,
)
from diana.data.text import prefix_length
from diana.tokenizer import encode
from tbps_common.errors import DatasetError, InputError
from tbps_common.run.batches import EpochBatches, ItemKey, SeededItems

MEAN, STD = [0.39, 0.37, 0.35], [0.24, 0.24, 0.23]


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "gpt", "value": question}, {"from": "user", "value": answer}]


RED, SHOES, BAG = turn("Who?", "A man in red."), turn("What shoes?", "White shoes."), turn("A bag?", "A black bag.")
RECORDS = [
    {"id": 70, "file_path": "p0.png", "chats": [RED, SHOES, BAG]},
    {"id": 9, "file_path": "p1.png", "chats": [[RED, BAG], [SHOES]]},
    {"id": 70, "file_path": "p2.png", "chats": [[RED]]},
]


@pytest.fixture
def meta(picture_folder: Path, tmp_path: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.json", RECORDS)
    return {
        "mean": MEAN,
        "std": STD,
        "image_root": str(picture_folder),
        "train_annotation": str(tmp_path / "train.json"),
        "test_annotation": str(tmp_path / "test.json"),
    }


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def training(meta: dict[str, Any], tokenizer: Any, **changes: Any) -> Any:
    settings = {"dataset_name": "chatpedes", "image_size": (24, 12), "max_seq_length": 400, **changes}
    return build_training_dataset(meta, tokenizer, **settings)


@pytest.mark.golden("diana", kind="transforms")
def test_stored_images(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    settings, expected = case.case, case.tensors("expected.safetensors")
    image = Image.open(case.folder / settings["image"])
    tolerance = settings["tolerance"]
    found = build_eval_transform(settings["size"], settings["mean"], settings["std"])(image)
    torch.testing.assert_close(found, expected["eval"], **tolerance)
    augment = build_train_transform(settings["size"], settings["mean"], settings["std"])
    for seed in settings["seeds"]:
        torch.manual_seed(seed)
        torch.testing.assert_close(augment(image), expected[f"train_{seed}"], **tolerance)


@pytest.mark.golden("diana", kind="masking")
def test_stored_masks(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    tensors = case.tensors("expected.safetensors")
    for number, settings in enumerate(case.case["cases"]):
        own = {name: settings[name] for name in ("mask_token_id", "protected_ids", "vocab_limit")}
        given = tensors[f"in_{number}"].clone()
        torch.manual_seed(settings["seed"])
        masked = mask_token_ids(given, settings["probability"], **own)
        assert torch.equal(masked, tensors[f"out_{number}"]) and torch.equal(given, tensors[f"in_{number}"])


def test_masking_rates() -> None:
    torch.manual_seed(0)
    ids = torch.full((1, 200_000), 7)
    ids[0, :1000] = 300
    masked = mask_token_ids(ids, 0.15, mask_token_id=302, protected_ids=[300, 301], vocab_limit=50)
    assert (masked[0, :1000] == 300).all()
    free = masked[0, 1000:]
    assert (free == 302).float().mean().item() == pytest.approx(0.15 * 0.8, abs=0.003)
    replaced = free[(free != 302) & (free != 7)]
    assert len(replaced) / len(free) == pytest.approx(0.15 * 0.1 * 49 / 50, abs=0.002)
    assert replaced.min() == 0 and replaced.max() == 49


def test_no_masking_draws_nothing() -> None:
    before = torch.get_rng_state()
    ids = torch.arange(5)[None]
    masked = mask_token_ids(ids, 0, mask_token_id=9, protected_ids=[], vocab_limit=5)
    assert torch.equal(masked, ids) and masked is not ids and torch.equal(torch.get_rng_state(), before)


def test_the_evaluation_view(meta: dict[str, Any], picture_folder: Path) -> None:
    view = load_annotations(meta, "test")
    assert view["images"] == [str(picture_folder / f"p{number}.png") for number in range(3)]
    assert view["image_ids"] == [0, 1, 0]
    assert view["chats"] == [[RED, SHOES, BAG], [RED, BAG], [SHOES], [RED]]
    assert view["caption_ids"] == [0, 1, 1, 0]


def test_several_files_share_their_labels(meta: dict[str, Any], tmp_path: Path) -> None:
    files = [write(tmp_path / "one.txt", RECORDS[:2]), write(tmp_path / "two.json", RECORDS[2:])]
    assert load_annotations({**meta, "test_annotation": files}, "test")["image_ids"] == [0, 1, 0]


def test_a_record_without_dialogue_stays_in_the_gallery(
    meta: dict[str, Any], tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for nothing in ([], [[]]):
        records = [*RECORDS, {"id": 5, "file_path": "p3.png", "chats": nothing}]
        write(tmp_path / "test.json", records)
        write(tmp_path / "train.json", records)
        caplog.clear()
        view = load_annotations(meta, "test")
        assert view["image_ids"] == [0, 1, 0, 2] and view["caption_ids"] == [0, 1, 1, 0]
        assert len(caplog.records) == 1 and "1 records without a dialogue" in caplog.text
        with pytest.raises(DatasetError, match=r"train.json: record 3 .*no dialogue to train on"):
            training(meta, tokenizer)


def test_a_question_without_answer_is_accepted(meta: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "test.json", [{**RECORDS[0], "chats": [RED, SHOES[:1]]}])
    chat = load_annotations(meta, "test")["chats"][0]
    assert render_dialogue(chat).endswith("ASSISTANT: What shoes?")


@pytest.mark.parametrize(
    "record, words",
    [
        ({"id": 1, "file_path": "p0.png", "chats": [[RED[1]]]}, "record 0 .*'chats' .*turn 0 .*start with gpt"),
        ({"id": 1, "file_path": "p0.png", "chats": [[RED, [{"from": "me", "value": ""}]]]}, "turn 1 .*'me'"),
        ({"id": 1, "file_path": "p0.png", "chats": {"a": 1}}, "'chats'"),
        ({"id": 1, "file_path": "p0.png", "chats": [[RED], "x"]}, "'chats' must hold a list of turns or of dialogues"),
        ({"id": 1, "file_path": "p0.png"}, "'chats' is missing"),
        ({"id": 1, "file_path": "../p0.png", "chats": [RED]}, "climbs out of the folder"),
        ({"id": None, "file_path": "p0.png", "chats": [RED]}, "'id'"),
    ],
)
def test_unusable_records_are_named(meta: dict[str, Any], tmp_path: Path, record: dict[str, Any], words: str) -> None:
    write(tmp_path / "test.json", [record])
    with pytest.raises(DatasetError, match=f"test.json.*{words}"):
        load_annotations(meta, "test")


def test_a_missing_split_and_an_empty_file(meta: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="val_annotation.*--split"):
        load_annotations(meta, "val")
    write(tmp_path / "test.json", [])
    with pytest.raises(DatasetError, match="holds no record"):
        load_annotations(meta, "test")


def test_the_other_name_of_the_image_folder(
    meta: dict[str, Any], picture_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture_folder.rename(picture_folder.parent / "imgs00")
    view = load_annotations(meta, "test")
    assert view["images"][0] == str(picture_folder.parent / "imgs00" / "p0.png") and len(caplog.records) == 1


def test_the_data_set_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dataset_config.yaml"
    file.write_text(
        "chatpedes:\n  mean: [0.1, 0.2, 0.3]\n  std: [1, 1, 1]\n  image_root: <Dataset Root>/ChatPedes/imgs\n"
        "  train_annotation: [<Dataset Root>/a.json, <Dataset Root>/b.json]\n",
        encoding="utf-8",
    )
    monkeypatch.delenv("DIANA_DATA_ROOT", raising=False)
    with pytest.raises(InputError, match="image_root still holds <Dataset Root>.*DIANA_DATA_ROOT"):
        load_dataset_config(file, "chatpedes")
    monkeypatch.setenv("DIANA_DATA_ROOT", "/data")
    meta = load_dataset_config(file, "chatpedes")
    assert meta["image_root"] == "/data/ChatPedes/imgs" and meta["train_annotation"] == ["/data/a.json", "/data/b.json"]
    with pytest.raises(InputError, match="no entry 'mals' .*has chatpedes"):
        load_dataset_config(file, "mals")


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "not valid YAML"),
        ("- 1", "no entry"),
        ("d: {mean: [1, 2], std: [1, 1, 1], image_root: x}", "mean must be three numbers"),
        ("d: {mean: [1, 2, 3], std: [1, 1, .nan], image_root: x}", "std must be three numbers"),
        ("d: {mean: [1, 2, 3], std: [1, 1, 1]}", "image_root must be a folder"),
        ("d: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_unusable_data_set_files(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        load_dataset_config(tmp_path / "c.yaml", "d")
    with pytest.raises(InputError, match="cannot be read"):
        load_dataset_config(tmp_path / "absent.yaml", "d")


def test_dialogue_samples(meta: dict[str, Any], tokenizer: Any) -> None:
    data = training(meta, tokenizer)
    assert len(data) == data.num_captions == 4 and data.num_images == 3 and data.num_ids == 2
    assert data.labels == [0, 1, 1, 0] and [Path(path).name for path in data.images] == ["p0.png", "p1.png", "p2.png"]
    item = data[1]
    expected = encode(tokenizer, [render_dialogue([RED, BAG])], 400)
    assert torch.equal(item["input_ids"], expected["input_ids"][0]) and item["image_ids"].tolist() == [1]
    assert item["pixel_values"].shape == (3, 24, 12) and torch.equal(
        item["attention_mask"], expected["attention_mask"][0]
    )
    assert data.text_lengths == [sum(len(m["value"]) for r in chat for m in r) for chat in data.texts]


def test_forked_and_spawned_loaders_give_the_same_batches(meta: dict[str, Any], tokenizer: Any) -> None:
    data = training(meta, tokenizer, enable_random_turn=True, mask_probability=0.4)
    found = {}
    for method in (None, "fork", "spawn"):
        loader = DataLoader(
            SeededItems(data),
            batch_sampler=EpochBatches(len(data), 2, seed=3),
            num_workers=0 if method is None else 1,
            collate_fn=Collate(tokenizer.pad_token_id),
            multiprocessing_context=method,
        )
        found[method] = list(loader)
    assert len(found[None]) == 2
    for method in ("fork", "spawn"):
        for batch, expected in zip(found[method], found[None], strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_the_draws_of_an_item_come_in_the_released_order(meta: dict[str, Any], tokenizer: Any) -> None:
    data = training(meta, tokenizer, enable_random_turn=True, mask_probability=0.4)
    random.seed(3)
    torch.manual_seed(4)
    item = data[0]
    random.seed(3)
    torch.manual_seed(4)
    kept = [RED, SHOES, BAG][: random.randint(1, 3)]
    image = build_train_transform((24, 12), MEAN, STD)(Image.open(data.paths[0]))
    ids = encode(tokenizer, [render_dialogue(kept)], 400)["input_ids"]
    protected = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    masked = mask_token_ids(
        ids, 0.4, mask_token_id=tokenizer.mask_token_id, protected_ids=protected, vocab_limit=tokenizer.vocab_size
    )
    assert torch.equal(item["pixel_values"], image) and torch.equal(item["input_ids"], masked[0])
    assert not torch.equal(masked, ids)


def test_turn_limit_comes_before_the_random_number_of_rounds(meta: dict[str, Any], tokenizer: Any) -> None:
    data = training(meta, tokenizer, turn_limit=2, enable_random_turn=True)
    assert [len(chat) for chat in data.texts] == [2, 2, 1, 1]
    allowed = {render_dialogue([RED]), render_dialogue([RED, SHOES])}
    seen = {
        tokenizer.decode(item["input_ids"][1 : int(item["attention_mask"].sum())])
        for item in (data[0] for _ in range(30))
    }
    assert seen == allowed


def test_captions(meta: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    records = [
        {"image": f"p{n}.png", "image_id": f"i{n % 2}", "caption": "A MAN, in red (coat)!  " * 9} for n in range(4)
    ]
    files = [
        write(tmp_path / "g_0.json", records[:3]),
        write(tmp_path / "g_1.json", records[3:]),
        str(tmp_path / "x.md"),
    ]
    mals = {**meta, "train_annotation": files}
    prefix = prefix_length(tokenizer)
    for budget, length in (("caption", 12 + prefix), ("total", 12)):
        data = training(mals, tokenizer, dataset_name="mals", max_seq_length=12, caption_budget=budget)
        assert len(data) == 4 and data.labels == [0, 1, 0, 1] and data.num_ids == 2
        random.seed(0)
        item = data[0]
        random.seed(0)
        text = render_caption(" ".join(("a man, in red coat " * 9).split(" ")[:12]), random.choice(PROMPT_POOL))
        assert torch.equal(item["input_ids"], encode(tokenizer, [text], length)["input_ids"][0])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of newer Pythons
def test_worker_processes_and_seeds_give_the_same_items(meta: dict[str, Any], tokenizer: Any) -> None:
    data = ForkingPickler.loads(
        ForkingPickler.dumps(training(meta, tokenizer, enable_random_turn=True, mask_probability=0.3))
    )
    keys = [[ItemKey(2, 5), ItemKey(0, 6)], [ItemKey(1, 7)]]
    batches = [
        list(
            DataLoader(
                SeededItems(data),
                batch_sampler=keys,
                num_workers=workers,
                collate_fn=Collate(tokenizer.pad_token_id),
                multiprocessing_context="fork" if workers else None,
            )
        )
        for workers in (0, 1)
    ]
    for one, other in zip(*batches):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_corrupt_image_is_named(meta: dict[str, Any], tokenizer: Any, picture_folder: Path) -> None:
    (picture_folder / "p0.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="p0.png"):
        training(meta, tokenizer)[0]


@pytest.mark.parametrize("pad_to_max", [True, False])
def test_batches_are_as_long_as_their_longest_text(meta: dict[str, Any], tokenizer: Any, pad_to_max: bool) -> None:
    data = training(meta, tokenizer, pad_to_max_length=pad_to_max)
    whole = training(meta, tokenizer)
    collate = Collate(tokenizer.pad_token_id)
    for members in ([0, 1], [2], [3, 2, 0]):
        batch = collate([data[index] for index in members])
        longest = max(int(whole[index]["attention_mask"].sum()) for index in members)
        length = batch["input_ids"].shape[1]
        assert longest <= length <= longest + 7
        for row, index in enumerate(members):
            assert torch.equal(batch["input_ids"][row], whole[index]["input_ids"][:length])
            assert torch.equal(batch["attention_mask"][row], whole[index]["attention_mask"][:length])
        assert batch["image_ids"].shape == (len(members), 1) and batch["pixel_values"].shape[1:] == (3, 24, 12)


def test_a_batch_never_exceeds_its_limit(meta: dict[str, Any], tokenizer: Any) -> None:
    data = training(meta, tokenizer, max_seq_length=30)
    assert Collate(tokenizer.pad_token_id)([data[0], data[1]])["input_ids"].shape == (2, 30)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dataset_name": "flickr30k"}, "--dataset_name"),
        ({"max_seq_length": 0}, "--max_seq_length"),
        ({"mask_probability": 1.5}, "--mask_probability"),
        ({"caption_budget": "half"}, "--caption_budget"),
        ({"split": "val"}, "val_annotation"),
    ],
)
def test_unusable_training_settings(meta: dict[str, Any], tokenizer: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        training(meta, tokenizer, **changes)


def test_importing_the_data_package_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, diana.data, diana.retrieval, diana.model.folders, diana.preflight;"
        "from diana.data import load_annotations, load_dataset_config, render_dialogue;"
        "sys.exit(bool({'torch', 'transformers', 'torchvision', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_warning_without_reason(meta: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_annotations(meta, "test")
    assert not caplog.records
