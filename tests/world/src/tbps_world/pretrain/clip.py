"""`clip`: a CLIP that knows clothes, in OpenAI's layout, for CMLFA's `--pretrain_choice` and `tbps-compare`'s `clip:FILE`.

It learns from pictures squashed to a square, as CLIP's are, in two ways at once. Contrast: a picture and a caption belong
together if all that the caption says is true of the person, so captions of two people that say the same are no negatives.
Attributes: linear heads on the joint space, the same ones for both sides, name what a picture shows (from the class token,
and from the mean of the patches, which CMLFA and FAFA look at) and what a caption says; they are thrown away.
"""

import math
from pathlib import Path
from typing import cast

import torch
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from cmlfa.datasets.transforms import MEAN, STD
from cmlfa.model.clip import ClipGeometry, build_clip, image_tokens, text_tokens
from cmlfa.model.tokenizer import shared_tokenizer, tokenize
from tbps_common.run.checkpoint import save_checkpoint
from tbps_common.run.randomness import seed_everything
from tbps_world.pretrain.attributes import UNKNOWN, Reader, album, learn, share_read
from tbps_world.synth.attributes import MENTIONABLE, VALUES

FILE = "clip.pt"
GEOMETRY = ClipGeometry(
    embed_dim=128,
    vision_width=128,
    vision_layers=2,
    patch_size=16,
    context_length=40,
    vocab_size=49408,
    text_width=64,
    text_layers=2,
)
SIDE = 96  # pixels; a grid of 6 x 6 patches
PEOPLE = 4000
STEPS, BATCH, RATE = 1500, 64, 2e-3


def train_clip(folder: Path, *, seed: int, steps: int | None) -> dict[str, float]:
    """Train the model and write `clip.pt` into the folder.

    Args:
        folder: where to write.
        seed: of weights and order.
        steps: instead of the tuned number; a few of them are for tests, and draw fewer people.

    Returns:
        On people left aside, in percent: R@1 of their captions among their pictures, and the attributes that the heads
        name right from pictures and from captions.
    """
    seed_everything(seed)
    steps = steps or STEPS
    pictures = album(min(PEOPLE, 8 * steps))
    pixels = torch.cat([squashed(part) for part in pictures.pixels.split(BATCH)])
    worn = torch.tensor([[VALUES[name].index(getattr(one, name)) for name in MENTIONABLE] for one in pictures.people])
    ids = torch.stack([tokenize(text, shared_tokenizer(), GEOMETRY.context_length) for text in pictures.captions])
    # Few of the 49,408 words occur: the others' rows would only cost time.
    words, places = ids.unique(return_inverse=True)

    clip = build_clip(GEOMETRY, (SIDE, SIDE), GEOMETRY.patch_size)
    every_word = cast(nn.Embedding, clip.token_embedding)
    some_words = nn.Embedding.from_pretrained(every_word.weight[words].detach(), freeze=False)
    clip.token_embedding = some_words
    reader = Reader(GEOMETRY.embed_dim, unknown=False)
    temperature = Temperature()

    def loss(chosen: Tensor) -> Tensor:
        captions = 2 * chosen + torch.randint(2, chosen.shape)
        tokens = image_tokens(clip, normalised(shaken(pixels[chosen])))
        image, patches = tokens[:, 0], tokens[:, 1:].mean(dim=1)
        text = end_tokens(clip, places[captions])
        said = pictures.said[captions]
        return (
            contrast(temperature() * unit(text) @ unit(image).T, fits(said, worn[chosen]))
            + reader.loss(image, pictures.shown[chosen])
            + reader.loss(patches, pictures.shown[chosen])
            + reader.loss(text, said)
        )

    learn("clip", [clip, reader, temperature], loss, items=pictures.training, batch=BATCH, steps=steps, rate=RATE)

    with torch.no_grad():
        clip.eval()
        aside = slice(pictures.training, None), slice(2 * pictures.training, None)
        image = torch.cat([image_tokens(clip, normalised(part))[:, 0] for part in pixels[aside[0]].split(BATCH)])
        text = torch.cat([end_tokens(clip, part) for part in places[aside[1]].split(BATCH)])
        every_word.weight[words] = some_words.weight
    clip.token_embedding = every_word
    save_checkpoint({**clip.state_dict(), "logit_scale": temperature.logarithm.detach()}, folder / FILE)
    people = torch.tensor([hash(one) for one in pictures.people[aside[0]]])
    found = (unit(text) @ unit(image).T).argmax(dim=1)
    return {
        "R@1, %": round(100 * float((people[found] == people.repeat_interleave(2)).float().mean()), 1),
        "attributes seen, %": share_read(reader, [image], pictures.shown[aside[0]]),
        "attributes read, %": share_read(reader, [text], pictures.said[aside[1]]),
    }


class Temperature(nn.Module):
    """CLIP's learnt inverse temperature, at most 100."""

    def __init__(self) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self) -> Tensor:
        """A scalar."""
        return self.logarithm.exp().clamp(max=100)


def squashed(pixels: Tensor) -> Tensor:
    """Pictures `[N, 3, H, W]` as bytes `[N, 3, SIDE, SIDE]`, as CLIP's transform squashes them."""
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)


def shaken(pixels: Tensor) -> Tensor:
    """Pictures mirrored and moved at random."""
    mirrored = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    down, right = torch.randint(-5, 6, (2,)).tolist()
    return mirrored.roll((down, right), (2, 3))


def normalised(pixels: Tensor) -> Tensor:
    """Bytes as CLIP's transform gives them to the image tower."""
    return (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def end_tokens(clip: CLIP, ids: Tensor) -> Tensor:
    """The output at the end of every caption: `[B, L]`, ordered as the vocabulary, to `[B, D]`."""
    ends = ids.argmax(dim=1)
    return text_tokens(clip, ids[:, : int(ends.max()) + 1])[torch.arange(len(ids)), ends]


def fits(said: Tensor, worn: Tensor) -> Tensor:
    """Which captions `[B, A]` say nothing wrong of which people `[B', A]`: bool `[B, B']`."""
    return ((said[:, None] == UNKNOWN) | (said[:, None] == worn[None])).all(dim=2)


def contrast(logits: Tensor, fitting: Tensor) -> Tensor:
    """Symmetric cross-entropy against all pairs that fit, in equal shares.

    Args:
        logits: `[B, B]`, of each text (row) with each picture (column).
        fitting: bool `[B, B]`, which of them fit; row i describes picture i.
    """
    target = fitting.float()
    to_image = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    to_text = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (to_image + to_text) / 2


def unit(features: Tensor) -> Tensor:
    """Rows of length 1."""
    return F.normalize(features, dim=-1)
