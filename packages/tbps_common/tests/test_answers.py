"""What is taken for a chat model's answer: one case for each way in which models wrap it."""

import json

import pytest

from tbps_common.pipeline import Rejected, final_answer, json_values

CAPTION = "A man in a red coat carries a bag."
VERDICT = {"fits": True}


@pytest.mark.parametrize(
    "text",
    [
        CAPTION,
        f"  {CAPTION}\n",
        f"<think>\nA draft: a man in blue.\n</think>\n\n{CAPTION}",
        f"<think></think>{CAPTION}",
        f"<think>\n\n</think>\n{CAPTION}",
        f"The user wants a caption. A draft.\n</think>\n{CAPTION}",
        f"<think>one <think>two</think> three</think> {CAPTION}",
        f"<THINKING>x</THINKING>{CAPTION}",
        f"<reasoning>x</reasoning>\n{CAPTION}",
        f"<seed:think>x</seed:think>{CAPTION}",
        f"[THINK]x[/THINK]{CAPTION}",
        f"<|channel|>analysis<|message|>A draft.<|end|><|start|>assistant<|channel|>final<|message|>{CAPTION}<|return|>",
        f"<|start|>assistant<|channel|>final<|message|>{CAPTION}",
        f"analysisThe user wants a caption.assistantfinal{CAPTION}",
        f"{CAPTION}<|im_end|>",
        f"{CAPTION}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd another one?",
        f"<|im_start|>assistant\n{CAPTION}<|im_end|>\n<|im_start|>user\nmore",
        f"{CAPTION}</s>",
        f"{CAPTION}<end_of_turn>",
        f"Sure! Here is the rewritten sentence: {CAPTION}",
        f"Sure! Here is the rewritten sentence:\n\n{CAPTION}",
        f"Certainly, here's the caption:\n{CAPTION}\n\nLet me know if you need anything else!",
        f"Rewritten sentence: {CAPTION}",
        f"```\n{CAPTION}\n```",
        f"Here is the caption:\n```text\n{CAPTION}\n```\nI hope this helps.",
        f"**{CAPTION}**",
        f"**Answer:** {CAPTION}",
        CAPTION.replace("red", "**red**"),
        f'"{CAPTION}"',
        f"<think>x</think>\n\nSure! Here is the caption:\n\n**“{CAPTION}”**<|im_end|>",
    ],
)
def test_the_final_answer_is_all_that_is_left(text: str) -> None:
    assert final_answer(text) == CAPTION


@pytest.mark.parametrize(
    "text",
    [
        "<think>A man in a red coat, or",
        "<think>A man in a red coat.</think>",
        "<think>a</think><think>b",
        "<|channel|>analysis<|message|>A man in a red coat.",
        "<|im_end|>",
        '""',
        "```\n```",
    ],
)
def test_an_answer_without_a_final_part_is_rejected(text: str) -> None:
    with pytest.raises(Rejected, match="no final part"):
        final_answer(text)


@pytest.mark.parametrize(
    "text",
    [
        "Here is a man with two bags: a red one and a blue one.",
        "Sure-footed, the man walks over ice.",
        'The man\'s sign says "no <b> tags" in 3*4 letters.',
        "Okayama written on her shirt, she walks away.",
        '"Left" is on one shoe, on the other "right"',
    ],
)
def test_what_belongs_to_the_answer_stays(text: str) -> None:
    assert final_answer(text) == text


def test_json_is_found_wherever_it_stands() -> None:
    answer = json.dumps(VERDICT)
    for text in (
        answer,
        f"```json\n{answer}\n```",
        f"I looked at [1] and {{x}}. {answer} Done.",
        "{not} " * 40 + answer,
    ):
        assert list(json_values(final_answer(text)))[-1] == VERDICT
    draft = f"<think>At first sight {json.dumps({'fits': False})}, but no.</think>{answer}"
    assert list(json_values(final_answer(draft))) == [VERDICT]
    assert list(json_values('[{"a": [1, 2]}] {"b": NaN} {"c": 1}')) == [[{"a": [1, 2]}], {"c": 1}]


def test_brackets_without_end_cost_no_time() -> None:
    assert list(json_values("[" * 100_000)) == [] == list(json_values('{"a":' * 5_000))
