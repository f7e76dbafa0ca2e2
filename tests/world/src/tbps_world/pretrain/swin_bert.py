"""`swin_bert`: the Swin and the BERT that MRA's configuration starts from, each of which knows its own side only.

The Swin has learnt to tell the attributes of the person shown (the published one: ImageNet's classes). The BERT has read two
sentences about one person at a time, with words hidden: who is to guess a hidden "crimson" looks for "red" in the other
sentence. Its [CLS] also learns what the first sentence says, in place of the published one's next-sentence prediction.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mra.data.transforms import MEAN, STD
from mra.model.bert import TextEncoder, text_mask
from mra.model.settings import TextSettings, VisionSettings
from mra.model.swin import VisionEncoder
from mra.text.augmentation import pre_caption
from mra.text.tokens import build_tokenizer, tokenize
from tbps_world.pretrain.attributes import Album, Reader, album, learn, share_read, teach_attributes
from tbps_world.synth.lexicon import lexicon
from tbps_world.tiny.mra import (
    BERT,
    PRESETS,
    SWIN,
    make_vocabulary,
    network_sizes,
    write_bert_settings,
    write_bert_weights,
    write_swin,
)

PERSONS, PICTURE_STEPS, TEXT_STEPS = 3000, 1300, 600
_LONGEST = 36
_PAIRS = 48
_HIDDEN_SHARE = 0.2


def train(folder: Path, *, seed: int, steps: int | None) -> dict[str, float]:
    """Write the Swin file and the BERT folder under the names that MRA's configurations have for them.

    Args:
        folder: receives `swin_base_patch4_window7_224_22k.pth` and `bert-base-uncased/`, which belong into `data/`.
        seed: of weights and order.
        steps: of each of the two, in place of the tuned numbers; so few are trained on fewer persons.

    Returns:
        Percentages of attributes that are seen and read right on persons left aside.
    """
    pictures = album(PERSONS if steps is None else min(PERSONS, 32 * steps))
    vocabulary = make_vocabulary(lexicon())
    vision, text = network_sizes(PRESETS["toy"], len(vocabulary))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = vision["sda"]["vision_width"]
        bert = folder / Path(BERT).name
        write_bert_settings(bert, text, vocabulary)
        encoder = TextEncoder(TextSettings.from_config(text), width)
        figures = _teach_words(encoder, build_tokenizer(bert), pictures, steps or TEXT_STEPS)
        write_bert_weights(bert, encoder.state_dict())
        torch.manual_seed(seed)  # neither depends on how the other one is trained
        swin = VisionEncoder(VisionSettings.from_config({**vision["sda"], "drop_rate": 0.0}))
        figures |= teach_attributes(
            lambda images: swin(images)[:, 0], swin, width, pictures, (MEAN, STD), steps=steps or PICTURE_STEPS
        )
        write_swin(folder / Path(SWIN).name, swin.state_dict(), torch.zeros(1, width))
    return figures


def _teach_words(encoder: TextEncoder, tokenizer: Any, pictures: Album, steps: int) -> dict[str, float]:
    """Masked words in pairs of captions of one picture, and what the first one says."""
    texts = [pre_caption(caption, _LONGEST, False) for caption in pictures.captions]
    ids, atts = (part.unflatten(0, (-1, 2)) for part in tokenize(tokenizer, texts, _LONGEST))  # [N, 2, T]
    said = pictures.said.unflatten(0, (-1, 2))
    start, end, mask = (int(tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]", "[MASK]"))
    reader = Reader(encoder.embeddings.word_embeddings.embedding_dim, unknown=True)
    first_half = torch.arange(2 * _LONGEST) < _LONGEST

    def layers(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the text layers say of the sentence, and the states after the fusion layers."""
        sentence = hidden[:, 0]
        for number, layer in enumerate(encoder.layers, start=1):
            hidden = layer(hidden, mask)
            if number == encoder.fusion_layer:
                sentence = hidden[:, 0]
        return sentence, hidden

    def loss(chosen: Tensor) -> Tensor:
        order = [0, 1] if torch.rand(()) < 0.5 else [1, 0]
        words, visible = (part[chosen][:, order].flatten(1) for part in (ids, atts))  # [B, 2 T]
        # Half of the sentences stand alone, as they do in a retrieval.
        visible = visible * (first_half | (torch.rand(len(chosen), 1) < 0.5))
        hide = (torch.rand(words.shape) < _HIDDEN_SHARE) & (visible > 0) & (words != start) & (words != end)
        shown = torch.where(hide & (torch.rand(words.shape) < 0.8), mask, words)
        sentence, states = layers(encoder.embeddings(shown), text_mask(visible))
        guessed = F.cross_entropy(encoder.cls(states[hide]), words[hide])
        return guessed + 3 * reader.loss(sentence, said[chosen, order[0]])

    encoder.train()
    learn("words", [encoder, reader], loss, items=pictures.training, batch=_PAIRS, steps=steps, rate=3e-3)
    encoder.eval()
    with torch.no_grad():
        rest = slice(pictures.training, None)
        features = [
            layers(encoder.embeddings(words), text_mask(visible))[0]
            for words, visible in zip(ids[rest, 0].split(100), atts[rest, 0].split(100))
        ]
        return {"attributes read, %": share_read(reader, features, said[rest, 0])}
