"""Start weight `captioner`: a small BLIP-2 with T5 that says what the persons of the world wear, for `mra-dad caption`."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mra.dad.caption import clean
from mra.dad.options import CAPTION_PROMPT
from tbps_common.pipeline.models import quiet_libraries
from tbps_world.pretrain.attributes import Album, album, teach_attributes
from tbps_world.pretrain.diffusion import fit
from tbps_world.synth.lexicon import lexicon
from tbps_world.synth.vocabulary import SYNONYMS
from tbps_world.tiny.dad import tokenizer
from tbps_world.tiny.mra import make_vocabulary

PEOPLE, MEASURED = 500, 80
SIDE, WIDTH, QUERIES = 64, 64, 8
STEPS, BATCH = 500, 16
_ATTRIBUTES_SHARE = 0.7
"""Steps that the image encoder learns alone, as a share of those of captions: else words come long before colours."""


def train(folder: Path, *, seed: int = 0, steps: int | None = None) -> dict[str, float]:
    """Train the model and write it in transformers' layout.

    Args:
        folder: receives it.
        seed: of everything.
        steps: updates.

    Returns:
        On persons left aside, in percent: attributes that the image encoder tells right after its own training, garments
        whose colour a caption tells right, and garments for which it names a colour.
    """
    pictures = album(PEOPLE)
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        model, processor = _untrained()
        reader, normal = (
            processor.tokenizer,
            (processor.image_processor.image_mean, processor.image_processor.image_std),
        )

        def encode(normalised: Tensor) -> Tensor:
            squares = F.interpolate(normalised, (SIDE, SIDE), mode="bilinear", antialias=True)
            return model.vision_model(pixel_values=squares).pooler_output

        figures = teach_attributes(
            encode, model.vision_model, WIDTH, pictures, normal, steps=math.ceil((steps or STEPS) * _ATTRIBUTES_SHARE)
        )
        pixels = torch.cat([_pixels(processor, part) for part in pictures.pixels.split(100)])
        labels = reader(pictures.captions[: 2 * pictures.training], padding=True, return_tensors="pt").input_ids[:, 1:]
        labels = labels.masked_fill(labels == reader.pad_token_id, -100)  # without [CLS], which comes by itself
        prompt = processor(images=_pictures(pictures.pixels[:1]), text=[CAPTION_PROMPT], return_tensors="pt")

        def loss(batch: Tensor) -> Tensor:
            asked = {name: prompt[name].expand(len(batch), -1) for name in ("input_ids", "attention_mask")}
            return model(pixel_values=pixels[batch // 2].float(), **asked, labels=labels[batch]).loss

        fit("captioner", [model], loss, len(labels), steps or STEPS, batch=BATCH, rate=2e-3)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return {**figures, **_measure(model, processor, pictures)}


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


def _pictures(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]


def _pixels(processor: Any, pixels: Tensor) -> Tensor:
    return processor.image_processor(_pictures(pixels), return_tensors="pt").pixel_values.half()


@torch.no_grad()
def _measure(model: Any, processor: Any, pictures: Album) -> dict[str, float]:
    named = right = 0
    places = range(pictures.training, len(pictures.pixels))[:MEASURED]
    for first in range(0, len(places), 16):
        part = places[first : first + 16]
        shown = _pictures(pictures.pixels[part.start : part.stop])
        inputs = processor(images=shown, text=[CAPTION_PROMPT] * len(part), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=50, do_sample=False)
        for place, text in zip(part, processor.batch_decode(tokens, skip_special_tokens=True)):
            for group in ("upper", "lower"):
                said = colour_said(clean(text, CAPTION_PROMPT), group)
                named += said is not None
                right += said == getattr(pictures.people[place], f"{group}_colour")
    return {"colours right, %": 100 * right / max(named, 1), "garments named, %": 50 * named / len(places)}


def colour_said(text: str, group: str) -> str | None:
    """The colour that a caption gives to the upper or the lower garment, if it does."""
    kinds = [word for words in SYNONYMS[f"{group}_type"].values() for word in words]
    colours = {word: colour for colour, words in SYNONYMS[f"{group}_colour"].items() for word in words}

    def either(words: list[str]) -> str:
        return "|".join(re.escape(word).replace(r"\-", " ?- ?") for word in sorted(words, key=len, reverse=True))

    found = re.search(rf"\b({either(list(colours))}) ({either(kinds)})\b", text.lower())
    return None if found is None else colours[re.sub(" ?- ?", "-", found[1])]
