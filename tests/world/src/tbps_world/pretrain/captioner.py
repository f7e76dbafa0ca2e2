"""Start weight `captioner`: a small BLIP-2 with T5 that says what the persons of the world wear, for `mra-dad caption`."""

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mra.dad.caption import clean
from mra.dad.options import CAPTION_PROMPT
from tbps_common.pipeline.models import quiet_libraries
from tbps_world.pretrain.diffusion import fit
from tbps_world.pretrain.people import Shot, shots, start_people
from tbps_world.synth.lexicon import lexicon
from tbps_world.synth.vocabulary import SYNONYMS
from tbps_world.tiny.dad import tokenizer
from tbps_world.tiny.mra import make_vocabulary

PEOPLE, LEFT_ASIDE = 800, 40
SIDE, WIDTH, QUERIES = 64, 64, 8
STEPS, BATCH = 700, 16


def train(folder: Path, *, seed: int = 0, steps: int | None = None) -> dict[str, float]:
    """Train the model and write it in transformers' layout.

    Args:
        folder: receives it.
        seed: of everything.
        steps: updates.

    Returns:
        On persons left aside: share of the garments named with a colour that is the right one, and how many of both
        garments are named with one.
    """
    people = start_people(PEOPLE + LEFT_ASIDE)
    known, unseen = list(shots(people[LEFT_ASIDE:])), list(shots(people[:LEFT_ASIDE], captions=1))
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        model, processor = _untrained()
        reader = processor.tokenizer
        pixels = torch.cat(
            [_pixels(processor, known[first : first + 100]).half() for first in range(0, len(known), 100)]
        )
        texts = [caption.text for shot in known for caption in shot.captions]
        labels = reader(texts, padding=True, return_tensors="pt").input_ids[:, 1:]  # [CLS] comes by itself
        labels = labels.masked_fill(labels == reader.pad_token_id, -100)
        prompt = processor(images=[_picture(known[0])], text=[CAPTION_PROMPT], return_tensors="pt")

        def loss(batch: Tensor) -> Tensor:
            asked = {name: prompt[name].expand(len(batch), -1) for name in ("input_ids", "attention_mask")}
            return model(pixel_values=pixels[batch // 2].float(), **asked, labels=labels[batch]).loss

        fit("captioner", [model], loss, len(texts), steps or STEPS, batch=BATCH, rate=2e-3)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return _measure(model, processor, unseen)


def _untrained() -> tuple[Any, Any]:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    words = make_vocabulary(lexicon())
    config = Blip2Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 8,
            "initializer_range": 0.1,
        },
        qformer_config={
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 2 * WIDTH,
            "cross_attention_frequency": 1,
            "encoder_hidden_size": WIDTH,
            "vocab_size": len(words),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            "model_type": "t5",
            "d_model": WIDTH,
            "d_kv": 16,
            "d_ff": 2 * WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "vocab_size": len(words) + 1,
            "tie_word_embeddings": False,
            "decoder_start_token_id": words.index("[CLS]"),
            "pad_token_id": words.index("[PAD]"),
            "eos_token_id": words.index("[SEP]"),
        },
        num_query_tokens=QUERIES,
        image_token_index=len(words),
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    torch.nn.init.normal_(model.language_model.lm_head.weight, std=0.05)  # as it comes, words are all but certain
    processor = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    return model, Blip2Processor(processor, tokenizer(words), num_query_tokens=QUERIES)


def _picture(shot: Shot) -> Image.Image:
    return Image.fromarray(shot.drawing.picture)


def _pixels(processor: Any, chosen: list[Shot]) -> Tensor:
    return processor.image_processor([_picture(shot) for shot in chosen], return_tensors="pt").pixel_values


@torch.no_grad()
def _measure(model: Any, processor: Any, unseen: list[Shot]) -> dict[str, float]:
    named = right = 0
    for first in range(0, len(unseen), 16):
        part = unseen[first : first + 16]
        inputs = processor(
            images=[_picture(shot) for shot in part], text=[CAPTION_PROMPT] * len(part), return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=50, do_sample=False)
        for shot, text in zip(part, processor.batch_decode(tokens, skip_special_tokens=True)):
            for group in ("upper", "lower"):
                said = colour_said(clean(text, CAPTION_PROMPT), group)
                named += said is not None
                right += said == getattr(shot.person, f"{group}_colour")
    return {"colours right": right / max(named, 1), "garments named": named / (2 * len(unseen))}


def colour_said(text: str, group: str) -> str | None:
    """The colour that a caption gives to the upper or the lower garment, if it does."""
    kinds = [word for words in SYNONYMS[f"{group}_type"].values() for word in words]
    colours = {word: colour for colour, words in SYNONYMS[f"{group}_colour"].items() for word in words}

    def either(words: list[str]) -> str:
        return "|".join(re.escape(word).replace(r"\-", " ?- ?") for word in sorted(words, key=len, reverse=True))

    found = re.search(rf"\b({either(list(colours))}) ({either(kinds)})\b", text.lower())
    return None if found is None else colours[re.sub(" ?- ?", "-", found[1])]
