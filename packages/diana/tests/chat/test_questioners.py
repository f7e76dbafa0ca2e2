"""Which question is asked next."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from diana.chat.questioners import FixedList, InformationGain, LanguageModel, make_round, mutual_information
from diana.chat.questions import QUESTIONS, open_questions
from tbps_common.pipeline import ChatClient
from tbps_world.practice.faults import FaultyServer


def test_questions_are_distinct_and_have_distinct_answers() -> None:
    assert (
        len({question.topic for question in QUESTIONS})
        == len({question.text for question in QUESTIONS})
        == len(QUESTIONS)
    )
    for question in QUESTIONS:
        assert len(set(question.answers)) == len(question.answers) >= 2
        # An answer to a question settles its topic, so that it is not asked about again.
        rounds = [make_round("Please describe the person you saw.", question.answers[-1])]
        settled = question not in open_questions(rounds)
        assert settled or question.answers[-1] in ("No.", "Heavy.", "Elderly.")


def test_what_was_asked_or_said_is_not_asked_again() -> None:
    rounds = [
        make_round("Who?", "A young lady in a RED coat, with blue jeans."),
        make_round(QUESTIONS[3].text, "I forgot."),
    ]
    topics = [question.topic for question in open_questions(rounds)]
    assert topics == ["bag", "shoes", "headwear", "accessories"]
    rounds += [make_round(question.text, "No.") for question in open_questions(rounds)]
    assert open_questions(rounds) == []
    assert FixedList()(rounds) is None
    assert InformationGain(lambda dialogues: torch.zeros(len(dialogues), 3), 50.0)(rounds) is None


def test_a_topic_that_a_language_model_asked_about_in_its_own_words_is_not_asked_again() -> None:
    rounds = [make_round("Who?", "Somebody."), make_round("Did they carry a rucksack or purse?", "I don't know.")]
    assert "bag" not in [question.topic for question in open_questions(rounds)]


def test_mutual_information_is_that_of_the_joint_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    belief = torch.rand(7, generator=generator, dtype=torch.float64)
    belief /= belief.sum()
    answers = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    answers /= answers.sum(dim=0)
    joint = answers * belief
    expected = 0.0
    for a, c in itertools.product(range(4), range(7)):
        p = float(joint[a, c])
        expected += p * math.log2(p / (float(joint[a].sum()) * float(joint[:, c].sum())))
    assert mutual_information(belief, answers) == pytest.approx(expected, abs=1e-12)
    perfect = torch.eye(4, dtype=torch.float64)
    assert mutual_information(torch.full((4,), 0.25, dtype=torch.float64), perfect) == pytest.approx(2.0)
    useless = torch.full((4, 4), 0.25, dtype=torch.float64)
    assert mutual_information(torch.full((4,), 0.25, dtype=torch.float64), useless) == pytest.approx(0.0, abs=1e-12)


def test_the_question_that_tells_the_candidates_apart_is_asked() -> None:
    """Eight candidates of whom half carry a bag, and who are alike in everything else: only the bag tells."""
    gallery = torch.arange(8)
    asked = []

    def score(dialogues: Sequence[Sequence[list[dict[str, str]]]]) -> torch.Tensor:
        rows = []
        for dialogue in dialogues:
            asked.append(dialogue)
            last = dialogue[-1][1]["value"]
            rows.append((gallery % 2 == 0).float() if last.startswith("Yes, a backpack") else torch.zeros(8))
        return torch.stack(rows)

    questioner = InformationGain(score, scale=20.0)
    rounds = [make_round("Please describe the person you saw.", "Somebody.")]
    gains = {question.topic: gain for question, gain in questioner.gains(rounds)}
    assert max(gains, key=lambda topic: gains[topic]) == "bag"
    assert gains["bag"] > 0.5
    assert all(gain == pytest.approx(0, abs=1e-6) for topic, gain in gains.items() if topic != "bag")
    assert questioner(rounds) == next(q.text for q in QUESTIONS if q.topic == "bag")
    # An answer that fits every image better than the others do says nothing about them.
    biased = InformationGain(lambda dialogues: score(dialogues) + torch.arange(len(dialogues))[:, None], 20.0)
    assert {q.topic: g for q, g in biased.gains(rounds)}["bag"] == pytest.approx(gains["bag"], abs=1e-5)


def test_who_is_already_ruled_out_does_not_count() -> None:
    """The hair tells apart two who are still candidates, the shoes two who are not."""

    def score(dialogues: Sequence[Sequence[list[dict[str, str]]]]) -> torch.Tensor:
        rows = []
        for dialogue in dialogues:
            row = torch.tensor([1.0, 1.0, 0.0, 0.0])
            said = dialogue[-1][1]["value"]
            row = row + torch.tensor([1.0, 0, 0, 0]) * (said == "A bald head.")
            row = row + torch.tensor([0, 0, 1.0, 0]) * (said == "Sandals.")
            rows.append(row)
        return torch.stack(rows)

    gains = {q.topic: gain for q, gain in InformationGain(score, 20.0).gains([make_round("Who?", "Somebody.")])}
    assert gains["hair"] > 0.3
    assert gains["shoes"] < 0.01


def test_the_list_takes_over_when_the_language_model_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rounds = [make_round("Who?", "Somebody.")]
    with FaultyServer(lambda messages: "Which shoes?", share=1.0, faults=("server_error",)) as server:
        client = ChatClient("m", base_url=server.url, max_retries=0, key_optional=True)
        questioner = LanguageModel(client, FixedList())
        assert questioner(rounds) == QUESTIONS[0].text
        assert "status 500" in capsys.readouterr().err
        server.share = 0.0  # a server that recovers is asked again
        assert questioner(rounds) == "Which shoes?"
    assert questioner(rounds) == QUESTIONS[0].text  # and one that is gone is not
    assert "the connection failed" in capsys.readouterr().err
