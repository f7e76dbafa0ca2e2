"""`blip2`: a BLIP-2 of the first stage for FAFA's `--backbone`: the frozen image tower of `clip`, and a Q-Former taught with it.

As in BLIP-2 (Li et al. 2023, section 3.2) the Q-Former learns from single pictures and captions: contrast of the query tokens
with the caption, and whether a caption read beside the picture fits it. Heads that are thrown away name attributes besides.
Nothing here tells it how a picture and a change make another picture: that is FAFA's.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlfa.model.start_weights import read_clip_file
from fafa.losses import token_similarity
from fafa.model.fafa import Blip2FAFACPR
from fafa.model.settings import read_settings
from fafa.model.weights import load_official_state_dict, official_state_dict
from fafa.processors import BlipCaptionProcessor
from tbps_common.run.checkpoint import save_checkpoint
from tbps_common.run.randomness import seed_everything
from tbps_world.pretrain import clip
from tbps_world.pretrain.attributes import UNKNOWN, Reader, album, learn, share_read
from tbps_world.pretrain.clip import contrast, fits, normalised, squashed, unit
from tbps_world.synth.attributes import MENTIONABLE, VALUES
from tbps_world.tiny.fafa import pedestrian_words, write_tiny_model

FILE = "blip2.pt"
WIDTH = 128
MODEL: dict[str, Any] = {
    "arch": "start",
    "load_pretrained": True,
    "pretrained": FILE,
    "vit_model": "clip_L",
    "image_size": clip.SIDE,
    "patch_size": clip.GEOMETRY.patch_size,
    "vit_width": clip.GEOMETRY.vision_width,
    "vit_depth": clip.GEOMETRY.vision_layers,
    "vit_heads": clip.GEOMETRY.vision_width // 64,
    "vit_precision": "fp32",
    "num_query_token": 12,
    "cross_attention_freq": 1,
    "embed_dim": 64,
    "max_txt_len": 40,
    "qformer": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # The usual 0.02 is far too small for this width: the features of all pictures stay the same for long.
        "initializer_range": 0.09,
    },
    "mfr_hidden_dim": WIDTH,
}
STEPS, BATCH, RATE = 900, 64, 1e-3


def train_blip2(folder: Path, *, seed: int, steps: int | None) -> dict[str, float]:
    """Train the model and write `blip2.pt`, `tiny.yaml` (for `--backbone`) and `vocab.txt` into the folder.

    Args:
        folder: where to write; beside it lies `clip`.
        seed: of weights and order.
        steps: instead of the tuned number; a few of them are for tests, and draw fewer people.

    Returns:
        On people left aside, in percent: R@1 of captions among pictures, captions rightly judged to fit or not (half of
        them do), and the attributes that the heads name right from query tokens and from captions.
    """
    seed_everything(seed)
    steps = steps or STEPS
    pictures = album(min(clip.PEOPLE, 8 * steps))
    worn = torch.tensor([[VALUES[name].index(getattr(one, name)) for name in MENTIONABLE] for one in pictures.people])
    backbone = write_tiny_model(folder, MODEL, pedestrian_words())
    model = Blip2FAFACPR(read_settings(backbone, load_pretrained=False))
    tower = read_clip_file(folder.parent / "clip" / clip.FILE)
    load_official_state_dict(
        model,
        {
            name.replace("visual.", "visual_encoder."): value
            for name, value in tower.items()
            if name.startswith("visual.")
        },
    )
    # The tower is frozen: what it makes of every picture, and of its mirror image, is computed once.
    with torch.no_grad():
        parts = squashed(pictures.pixels).split(BATCH)
        seen = [torch.cat([model.vit_states(normalised(part)).half() for part in parts])]
        seen.append(torch.cat([model.vit_states(normalised(part.flip(3))).half() for part in parts]))
    clean = BlipCaptionProcessor()
    captions = model.tokenizer(
        [clean(text) for text in pictures.captions],
        padding="max_length",
        truncation=True,
        max_length=model.max_txt_len,
        return_tensors="pt",
    )

    def words_of(chosen: Tensor) -> dict[str, Tensor]:
        mask = captions["attention_mask"][chosen]
        longest = int(mask.sum(1).max())
        return {"input_ids": captions["input_ids"][chosen, :longest], "attention_mask": mask[:, :longest]}

    def image_side(states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, T, H]` and unit tokens `[B, T, D]`."""
        hidden = model.image_hidden(states)
        return hidden, unit(model.vision_proj(hidden))

    def text_side(words: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, H]` and unit features `[B, D]`."""
        hidden = model.forward_text(words)
        return hidden, unit(model.text_proj(hidden))

    def judged(states: Tensor, words: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits `[B, 2]` of fitting, and the caption's `[CLS]` `[B, H]` that has looked at the picture."""
        hidden = model.Qformer(
            queries=model.query_tokens.expand(len(states), -1, -1),
            input_ids=words["input_ids"],
            text_mask=words["attention_mask"],
            image_states=states,
        )
        count = model.num_query_token
        return model.itm_head(hidden[:, :count]).mean(dim=1), hidden[:, count]

    from_image, from_text, from_both = (Reader(WIDTH, unknown=False) for _ in range(3))

    def loss(chosen: Tensor) -> Tensor:
        states = model.ln_vision(seen[int(torch.rand(()) < 0.5)][chosen].float())
        own = 2 * chosen + torch.randint(2, chosen.shape)
        words, said, shown = words_of(own), pictures.said[own], pictures.shown[chosen]
        hidden, tokens = image_side(states)
        text_hidden, text = text_side(words)
        fitting = fits(said, worn[chosen])
        # Every other picture is shown with another one's caption.
        half = len(chosen) // 2
        mixed = torch.cat([own[:half], own[half:].roll(1)])
        logits, both = judged(states, words_of(mixed))
        true = fits(pictures.said[mixed], worn[chosen]).diagonal()
        similarity = token_similarity(text, tokens).amax(dim=-1)
        return (
            contrast(similarity / model.temp, fitting)
            + F.cross_entropy(logits, true.long())
            + from_image.loss(hidden.mean(dim=1), shown)
            + from_text.loss(text_hidden, said)
            + from_both.loss(both, torch.where(true[:, None] & (shown == UNKNOWN), pictures.said[mixed], shown))
        )

    taught = [part for name, part in model.named_children() if name not in ("visual_encoder", "mlm_predictor")]
    readers = [from_image, from_text, from_both]
    trained = torch.nn.ParameterList([model.query_tokens, model.temp])
    learn("blip2", [*taught, trained, *readers], loss, items=pictures.training, batch=BATCH, steps=steps, rate=RATE)
    state = {name: value for name, value in official_state_dict(model).items() if not name.startswith("mlm_predictor.")}
    save_checkpoint({"model": state}, folder / FILE)

    with torch.no_grad():
        model.eval()
        chosen = torch.arange(pictures.training, len(pictures.people))
        states = model.ln_vision(seen[0][chosen].float())
        hidden, tokens = image_side(states)
        own = torch.arange(2 * pictures.training, len(pictures.captions))
        text_hidden, text = text_side(words_of(own))
        found = token_similarity(text, tokens).amax(dim=-1).argmax(dim=1)
        people = torch.tensor([hash(pictures.people[place]) for place in chosen])
        first, other = 2 * chosen, (2 * chosen).roll(2)
        right = [judged(states, words_of(first))[0].argmax(1) == 1, judged(states, words_of(other))[0].argmax(1) == 0]
    return {
        "R@1, %": round(100 * float((people[found] == people.repeat_interleave(2)).float().mean()), 1),
        "fit judged, %": round(100 * float(torch.cat(right).float().mean()), 1),
        "attributes seen, %": share_read(from_image, [hidden.mean(dim=1)], pictures.shown[chosen]),
        "attributes read, %": share_read(from_text, [text_hidden], pictures.said[own]),
    }
