"""`swin_llama`: the SwinV2 and the small Llama that DiaNA's scripts start from, each of which knows its own side only.

The SwinV2 has learnt to tell the attributes of the person shown. The Llama is a language model of dialogues and captions, and
its state at the end of a text has also learnt to tell as much of the person as the text says.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, Swinv2Model
from transformers.utils import logging

from diana.data import PROMPT_POOL, clean_caption, render_caption, render_dialogue
from diana.tokenizer import encode, load_tokenizer
from tbps_world.pretrain.attributes import UNKNOWN, Album, Reader, album, learn, share_read, teach_attributes
from tbps_world.synth.dialogues import TURNS, write_dialogue
from tbps_world.tiny.diana import main as write_random
from tbps_world.toys.diana import TINY_FLAGS

PERSONS, PICTURE_STEPS, TEXT_STEPS = 3000, 1300, 600
# Of MALS, with which the training begins.
MEAN, STD = (0.4416847, 0.41812873, 0.4237452), (0.3088255, 0.29743394, 0.301009)
_TEXTS = 32
_LONGEST = 256


def train(folder: Path, *, seed: int, steps: int | None) -> dict[str, float]:
    """Write `swinv2-tiny/`, `llama-tiny/` and `configs/`, for VISION_PRETRAINED, LLAMA_PRETRAINED and CONFIG_DIR.

    Args:
        folder: receives them.
        seed: of weights and order.
        steps: of each of the two, in place of the tuned numbers; so few are trained on fewer persons.

    Returns:
        Percentages of attributes that are told right on persons left aside: from pictures, and from whole dialogues.
    """
    pictures = album(PERSONS if steps is None else min(PERSONS, 32 * steps))
    write_random(["--out", str(folder), *TINY_FLAGS, "--seed", str(seed)])
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = LlamaForCausalLM.from_pretrained(folder / "llama-tiny")
        figures = _teach_texts(llama, load_tokenizer(folder / "llama-tiny"), pictures, steps or TEXT_STEPS, seed)
        llama.save_pretrained(folder / "llama-tiny")
        torch.manual_seed(seed)  # neither depends on how the other one is trained
        swin = Swinv2Model.from_pretrained(folder / "swinv2-tiny")
        figures |= teach_attributes(
            lambda images: swin(images).pooler_output,
            swin,
            swin.num_features,
            pictures,
            (MEAN, STD),
            steps=steps or PICTURE_STEPS,
        )
        swin.save_pretrained(folder / "swinv2-tiny")
    return figures


def _teach_texts(llama: LlamaForCausalLM, tokenizer: Any, pictures: Album, steps: int, seed: int) -> dict[str, float]:
    """The next token of every text, and at its end the person."""
    generator = np.random.default_rng(seed)
    reader = Reader(llama.config.hidden_size, unknown=False)

    def text_of(picture: int) -> str:
        """A dialogue up to some round, or one of the captions as an answer."""
        if generator.integers(3):
            dialogue = write_dialogue(pictures.people[picture], pictures.seen[picture], generator)
            return render_dialogue(dialogue, int(generator.integers(1, TURNS + 1)))
        caption = clean_caption(pictures.captions[2 * picture + int(generator.integers(2))], 56)
        return render_caption(caption, PROMPT_POOL[int(generator.integers(len(PROMPT_POOL)))])

    def states_of(tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """All states `[B, L, D]`, and those at the ends of the texts `[B, D]`."""
        states = llama.model(input_ids=tokens["input_ids"], use_cache=False).last_hidden_state
        return states, states[torch.arange(len(states)), tokens["attention_mask"].sum(dim=1) - 1]

    def loss(chosen: Tensor) -> Tensor:
        tokens = encode(tokenizer, [text_of(picture) for picture in chosen.tolist()], _LONGEST, pad_to_max=False)
        states, ends = states_of(tokens)
        following = tokens["input_ids"][:, 1:].masked_fill(tokens["attention_mask"][:, 1:] == 0, UNKNOWN)
        guessed = F.cross_entropy(
            llama.lm_head(states[:, :-1]).flatten(0, 1), following.flatten(), ignore_index=UNKNOWN
        )
        return guessed + 3 * reader.loss(ends, pictures.shown[chosen])

    llama.train()
    learn("texts", [llama, reader], loss, items=pictures.training, batch=_TEXTS, steps=steps, rate=3e-3)
    llama.eval()
    with torch.no_grad():
        rest = range(pictures.training, len(pictures.people))
        texts = [render_dialogue(write_dialogue(pictures.people[n], pictures.seen[n], generator)) for n in rest]
        features = [
            states_of(encode(tokenizer, texts[start : start + 100], _LONGEST, pad_to_max=False))[1]
            for start in range(0, len(texts), 100)
        ]
        return {"attributes told, %": share_read(reader, features, pictures.shown[rest.start :])}
