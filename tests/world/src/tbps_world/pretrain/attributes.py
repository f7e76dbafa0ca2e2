"""What image encoders and readers of text learn first: the attributes of the person who is shown, or described.

This stands for the classes of ImageNet, which the papers' image encoders were taught, and for what language models have read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tbps_world.pretrain.people import shots, start_people
from tbps_world.synth.attributes import ABSENT, MENTIONABLE, VALUES, Person
from tbps_world.synth.captions import Caption
from tbps_world.synth.drawing import Seen

UNKNOWN = -1
"""Code of an attribute that cannot be seen, or is not said."""
CLASSES = [len(VALUES[name]) for name in MENTIONABLE]
MOST_ASIDE = 200
"""Persons whom a start weight is measured on, and not trained on; never more than those it is trained on."""


@dataclass(frozen=True)
class Album:
    """Pictures of many persons, in memory.

    Attributes:
        pixels: `[N, 3, 128, 64]` uint8.
        shown: `[N, A]` int64, code of every attribute of `MENTIONABLE`, `UNKNOWN` where it cannot be seen.
        said: `[2 N, A]` likewise, of what each caption says.
        people: who is shown, `seen` what the picture shows of them.
        captions: two of every picture: 2 n and 2 n + 1 belong to picture n.
        training: pictures before this place are trained on, the others measured on.
    """

    pixels: Tensor
    shown: Tensor
    said: Tensor
    people: list[Person]
    seen: list[Seen]
    captions: list[str]
    training: int


@lru_cache(maxsize=1)
def album(persons: int) -> Album:
    """Draw two pictures each of so many persons to train on, and of some to measure on."""
    people = start_people(persons + min(persons, MOST_ASIDE))
    pixels, shown, said, owners, seen, captions = [], [], [], [], [], []
    with tqdm(total=2 * len(people), desc="drawing", unit="picture", mininterval=5) as progress:
        for shot in shots(people):
            pixels.append(torch.from_numpy(shot.drawing.picture).permute(2, 0, 1).contiguous())
            shown.append(_shown(shot.person, shot.drawing.seen))
            said.extend(_said(caption) for caption in shot.captions)
            captions.extend(caption.text for caption in shot.captions)
            owners.append(shot.person)
            seen.append(shot.drawing.seen)
            progress.update()
    return Album(
        torch.stack(pixels), torch.tensor(shown), torch.tensor(said), owners, seen, captions, training=2 * persons
    )


def _shown(person: Person, seen: Seen) -> list[int]:
    return [
        VALUES[name].index(value) if name in seen.visible or value == ABSENT else UNKNOWN
        for name in MENTIONABLE
        for value in [getattr(person, name)]
    ]


def _said(caption: Caption) -> list[int]:
    return [VALUES[name].index(caption.facts[name]) if name in caption.facts else UNKNOWN for name in MENTIONABLE]


class Reader(nn.Linear):
    """Reads all attributes off one feature; a training tool, thrown away afterwards.

    Args:
        width: of the features.
        unknown: whether "not said" is an answer, too.
    """

    def __init__(self, width: int, *, unknown: bool):
        self.sizes = [size + unknown for size in CLASSES]
        super().__init__(width, sum(self.sizes))
        self.unknown = unknown

    def loss(self, feature: Tensor, codes: Tensor) -> Tensor:
        """Mean over the attributes of the cross-entropy of `[B, width]` and `[B, A]`."""
        answers, codes = self(feature).split(self.sizes, dim=1), codes + self.unknown
        losses = [F.cross_entropy(answer, code, ignore_index=UNKNOWN) for answer, code in zip(answers, codes.unbind(1))]
        return torch.stack(losses).mean()

    def right(self, feature: Tensor, codes: Tensor) -> Tensor:
        """`[B, A]`: whether each answer is right."""
        answers = [answer.argmax(dim=1) for answer in self(feature).split(self.sizes, dim=1)]
        return torch.stack(answers, dim=1) == codes + self.unknown


def learn(
    name: str,
    modules: Sequence[nn.Module],
    loss_of: Callable[[Tensor], Tensor],
    *,
    items: int,
    batch: int,
    steps: int,
    rate: float,
) -> None:
    """AdamW with a short rise and a linear fall of the rate.

    Args:
        name: of the progress bar.
        modules: whose parameters are trained.
        loss_of: indices `[batch]` to the loss.
        items: indices are below it.
        batch: items of a step.
        steps: of the optimizer.
        rate: the highest.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    with tqdm(total=steps, desc=name, unit="step", mininterval=5) as progress:
        for step, chosen in zip(range(steps), _batches(items, batch)):
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / 100, 1.02 - step / steps, 1.0)
            loss = loss_of(chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            progress.update()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{float(loss.detach()):.3f}")


def _batches(items: int, batch: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(items).split(batch)[: max(1, items // batch)]


def teach_attributes(
    encode: Callable[[Tensor], Tensor],
    encoder: nn.Module,
    width: int,
    pictures: Album,
    normal: tuple[Sequence[float], Sequence[float]],
    *,
    steps: int,
    rate: float = 2e-3,
) -> dict[str, float]:
    """Train an image encoder to tell the attributes of the person shown.

    Args:
        encode: normalised pictures `[B, 3, 128, 64]` to features `[B, width]`.
        encoder: whose weights are trained.
        width: of the features.
        pictures: to learn from, half of them mirrored, and to measure on.
        normal: mean and standard deviation of the channels.
        steps: of 32 pictures.
        rate: of learning.

    Returns:
        Percentage of visible attributes that are told right on persons left aside: of all, and of garments' colours.
    """
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in normal)
    reader = Reader(width, unknown=False)

    def feature(pixels: Tensor) -> Tensor:
        return encode((pixels.float() / 255 - mean) / deviation)

    def loss(chosen: Tensor) -> Tensor:
        pixels = pictures.pixels[chosen]
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(3)
        return reader.loss(feature(pixels), pictures.shown[chosen])

    encoder.train()
    learn("pictures", [encoder, reader], loss, items=pictures.training, batch=32, steps=steps, rate=rate)
    encoder.eval()
    with torch.no_grad():
        codes = pictures.shown[pictures.training :]
        parts = pictures.pixels[pictures.training :].split(100)
        right = torch.cat([reader.right(feature(part), code) for part, code in zip(parts, codes.split(100))])
    garments = [MENTIONABLE.index(name) for name in ("upper_colour", "lower_colour")]
    return {
        "attributes seen, %": _percent(right, codes != UNKNOWN),
        "colours seen, %": _percent(right[:, garments], codes[:, garments] != UNKNOWN),
    }


def share_read(reader: Reader, features: Iterable[Tensor], codes: Tensor) -> float:
    """Percentage of the attributes that texts state which a reader finds in their features."""
    feature = torch.cat(list(features))
    return _percent(reader.right(feature, codes), codes != UNKNOWN)


def _percent(right: Tensor, counted: Tensor) -> float:
    return round(100 * float(right[counted].float().mean()), 1)
