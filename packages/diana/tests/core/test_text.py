"""Rendering of dialogues and captions, to the byte, and the tokens they become."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diana.data import PROMPT_POOL, SYSTEM_PROMPT, clean_caption, render_caption, render_dialogue, split_chats
from diana.data.text import prefix_length
from diana.tokenizer import encode, load_tokenizer, ordinary_tokens
from tbps_common.errors import CheckpointError, InputError

ROUND = [{"from": "gpt", "value": "Who?"}, {"from": "user", "value": "A man. \n"}]


@pytest.mark.golden("diana", kind="text")
def test_stored_texts(golden: Any, golden_name: str) -> None:
    case = golden(golden_name).case
    assert [clean_caption(text, case["max_words"]) for text in case["captions"]] == case["cleaned"]
    for limit, text in case["rendered"].items():
        assert render_dialogue(case["chat"], int(limit)) == text
    for number, text in case["prompt_rendered"].items():
        assert render_caption(case["cleaned"][0], PROMPT_POOL[int(number)]) == text


@pytest.mark.golden("diana", kind="text")
def test_stored_tokens(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    expected, special = case.tensors("expected.safetensors"), case.case["special"]
    tokenizer = load_tokenizer((case.folder / case.case["tokenizer"]).resolve())
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert found == tuple(special[name] for name in ("bos", "eos", "pad", "mask"))
    assert ordinary_tokens(tokenizer) == special["plain"]
    for ending, length in (("", case.case["max_seq_length"]), ("_short", 20)):
        tokens = encode(tokenizer, case.case["texts"], length)
        assert all(torch.equal(value, expected[name + ending]) for name, value in tokens.items())
        ragged = encode(tokenizer, case.case["texts"], length, pad_to_max=False)
        longest = int(tokens["attention_mask"].sum(1).max())
        assert ragged["input_ids"].shape[1] == min(-(-longest // 8) * 8, length)
        assert torch.equal(ragged["input_ids"], tokens["input_ids"][:, : ragged["input_ids"].shape[1]])


def test_a_dialogue() -> None:
    text = f"{SYSTEM_PROMPT}\n\nASSISTANT: Who?\nUSER: A man."
    assert render_dialogue([ROUND]) == text
    assert render_dialogue([ROUND, ROUND], turn_limit=1) == text
    for limit in (0, -1, 2, 9):
        whole = f"{SYSTEM_PROMPT}\n\nASSISTANT: Who?\nUSER: A man. \n\nASSISTANT: Who?\nUSER: A man."
        assert render_dialogue([ROUND, ROUND], turn_limit=limit) == whole
    assert render_dialogue([ROUND[:1]]) == f"{SYSTEM_PROMPT}\n\nASSISTANT: Who?"
    assert render_dialogue([]) == render_dialogue([[]]) == ""
    assert len(SYSTEM_PROMPT) == 293 and len(PROMPT_POOL) == 7


@pytest.mark.parametrize(
    "messages, words",
    [
        ([ROUND[1]], "turns start with gpt"),
        ([ROUND[0], ROUND[0]], "message 1"),
        ([{"from": "system", "value": "x"}], "'system'"),
        ([{"from": "gpt"}], "'value'"),
        (["hello"], "not a list of messages"),
        ("hello", "not a list of messages"),
    ],
)
def test_rounds_that_are_none(messages: Any, words: str) -> None:
    with pytest.raises(InputError, match=f"Round 1 .*{words}"):
        render_dialogue([ROUND, messages])


def test_one_dialogue_or_several() -> None:
    assert split_chats([ROUND, ROUND]) == [[ROUND, ROUND]]
    assert split_chats([[ROUND], [ROUND, ROUND]]) == [[ROUND], [ROUND, ROUND]]
    assert split_chats([]) == []
    for wrong in ({"a": 1}, [[ROUND], "x"], ["x"]):
        with pytest.raises(InputError, match="chats must"):
            split_chats(wrong)


@given(st.text(), st.integers(1, 20))
def test_a_clean_caption_stays_clean(text: str, words: int) -> None:
    clean = clean_caption(text, words)
    assert not set(clean) & set('.!"()*#:;~') and len(clean.split(" ")) <= words
    assert clean == clean.lower() or not text.isascii()  # lower() is not idempotent beyond ASCII
    if text.isascii():
        assert clean_caption(clean, words) == clean


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200), st.integers(1, 60))
def test_any_text_has_tokens(text: str, length: int) -> None:
    tokenizer = TOKENIZERS[0]
    tokens = encode(tokenizer, [text], length)
    ids, mask = tokens["input_ids"][0], tokens["attention_mask"][0]
    real = int(mask.sum())
    assert len(ids) == length and ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids.tolist()
    assert mask.tolist() == [1] * real + [0] * (length - real)
    assert (ids[real:] == tokenizer.pad_token_id).all()
    if real < length:
        assert tokenizer.decode(ids[1:real]) == text


TOKENIZERS: list[Any] = []


@pytest.fixture(autouse=True, scope="module")
def _for_hypothesis(tokenizer: Any) -> None:
    TOKENIZERS[:] = [tokenizer]


def test_the_prefix_is_what_all_dialogues_share(tokenizer: Any) -> None:
    length = prefix_length(tokenizer)
    texts = [render_caption("a red coat", prompt) for prompt in PROMPT_POOL]
    rows = encode(tokenizer, texts, 2000)["input_ids"]
    assert (rows[:, :length] == rows[0, :length]).all()
    assert tokenizer.decode(rows[0, 1:length]) == f"{SYSTEM_PROMPT}\n\n"


def test_missing_pad_and_mask_tokens_are_set(tokenizer_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(tokenizer_folder, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for name in ("pad_token", "mask_token"):
        settings.pop(name, None)
    file.write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>" and tokenizer.mask_token == "<|reserved_special_token_0|>"
    tokenizer.save_pretrained(str(tmp_path / "again"))
    assert load_tokenizer(tmp_path / "again")("a b")["input_ids"] == tokenizer("a b")["input_ids"]


def test_a_tokenizer_that_appends_an_end_token_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(tokenizer_folder, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": eos, "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (bos, eos)},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="add_eos_token"):
        load_tokenizer(tmp_path / "t")


def test_folders_without_a_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    for step in (9, 10):
        shutil.copytree(tokenizer_folder, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-9" / "tokenizer.json").write_text("{", encoding="utf-8")
    load_tokenizer(tmp_path)
    (tmp_path / "checkpoint-10" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
