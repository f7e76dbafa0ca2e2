"""Who asks next: the question that is expected to tell most, a fixed list, or a language model."""

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from torch.special import entr

from diana.chat.questions import Question, open_questions
from diana.dialogues.roles import ask_question
from tbps_common.pipeline import BadReply, ChatClient, Rejected, RequestFailed, ServerRefusal, ask_once

Round = list[dict[str, str]]
Score = Callable[[Sequence[Sequence[Round]]], Tensor]
"""Dialogues -> scores `[number of dialogues, N]` of the most likely images."""


class Questioner(Protocol):
    """Chooses the next question, or None when there is nothing left to ask."""

    def __call__(self, rounds: Sequence[Round]) -> str | None: ...


class FixedList:
    """The questions in their order, without those that are settled."""

    def __call__(self, rounds: Sequence[Round]) -> str | None:
        """The next question, or None."""
        left = open_questions(rounds)
        return left[0].text if left else None


class InformationGain:
    """The question whose answer is expected to narrow the candidates most, judged by the retrieval model itself.

    With the scores `s(c)` of the dialogue so far, the belief in candidate c is `p(c) = softmax_c(t s(c))`. For every open
    question and every answer a of its list, the dialogue is prolonged by both and scored again, `s_a(c)`. The answer that
    makes the dialogue fit an image best is what a witness of that image would say: `p(a | c) = softmax_a(t s'_a(c))`,
    where `s'` is `s_a` less its mean over the candidates, because some answers fit all images better than others. The
    question with the highest mutual information between answer and candidate,
    `H(sum_c p(c) p(a | c)) - sum_c p(c) H(p(a | c))`, is asked.

    Args:
        score: scores dialogues.
        scale: t, the model's inverse temperature.
    """

    def __init__(self, score: Score, scale: float) -> None:
        self._score, self._scale = score, scale

    def __call__(self, rounds: Sequence[Round]) -> str | None:
        """The next question, or None; equal gains keep the order of the list."""
        gains = self.gains(rounds)
        return max(gains, key=lambda pair: pair[1])[0].text if gains else None

    def gains(self, rounds: Sequence[Round]) -> list[tuple[Question, float]]:
        """Expected information of every open question in bits."""
        questions = open_questions(rounds)
        if not questions:
            return []
        hypothetical = [
            [*rounds, make_round(question.text, answer)] for question in questions for answer in question.answers
        ]
        scores = self._score([rounds, *hypothetical]).double()
        before, after = scores[0], scores[1:]
        belief = (self._scale * before).softmax(dim=0)
        after = after - after.mean(dim=1, keepdim=True)
        gains, start = [], 0
        for question in questions:
            stop = start + len(question.answers)
            gains.append((question, mutual_information(belief, (self._scale * after[start:stop]).softmax(dim=0))))
            start = stop
        return gains


def mutual_information(belief: Tensor, answers: Tensor) -> float:
    """Bits that the answer tells about the candidate.

    Args:
        belief: p(c) `[N]`.
        answers: p(a | c) `[A, N]`; every column sums to 1.
    """
    return float(_entropy(answers @ belief) - (belief * _entropy(answers)).sum())


def _entropy(probabilities: Tensor) -> Tensor:
    """In bits, over the first axis."""
    return entr(probabilities).sum(dim=0) / 0.6931471805599453


class LanguageModel:
    """Asks a language model; where it fails, another questioner takes over and the user is told.

    Args:
        client: of the server.
        substitute: asks when the server does not answer, and for good once the server refuses.
    """

    def __init__(self, client: ChatClient, substitute: Questioner) -> None:
        self._client: ChatClient | None = client
        self._substitute = substitute

    def __call__(self, rounds: Sequence[Round]) -> str | None:
        """The model's question, or the substitute's."""
        if self._client is None:
            return self._substitute(rounds)
        try:
            return ask_once(self._client, *ask_question(rounds))
        except (BadReply, Rejected, RequestFailed, ServerRefusal) as error:
            if isinstance(error, ServerRefusal):
                self._client = None
            print(f"note: the language model does not answer ({error}); asking from the list", file=sys.stderr)
            return self._substitute(rounds)


def make_round(question: str, answer: str) -> Round:
    """One question with its answer."""
    return [{"from": "gpt", "value": question}, {"from": "user", "value": answer}]
