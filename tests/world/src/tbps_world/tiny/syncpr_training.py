"""Teaching the tiny models something: a few minutes of training on small drawings, for the toy.

The Stable Diffusion learns wide pictures whose halves show *different* persons, each with its caption, so that it can draw
but does not know that both halves belong together: that is left to the LoRA. The CLIP learns which half has which caption.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fafa.syncpr.prompts import image_prompt
from fafa.syncpr.scoring import PADDING
from tbps_common.pipeline.models import quiet_libraries
from tbps_world.tiny.syncpr import clip_model, stable_diffusion
from tbps_world.tiny.vae import start_as_mean_colours
from tbps_world.toys.syncpr import SIDE, TEMPLATE

_LONGEST_PROMPT = 96
_BATCH = 16


@dataclass(frozen=True)
class Drawings:
    """Pictures of single persons and their captions.

    Attributes:
        pixels: `[N, 3, SIDE, SIDE / 2]` uint8.
        captions: one each.
    """

    pixels: Tensor
    captions: list[str]

    def wide(self, left: Tensor, right: Tensor) -> Tensor:
        """`[B, 3, SIDE, SIDE]` in [-1, 1]."""
        return torch.cat([self.pixels[left], self.pixels[right]], dim=-1).float() / 127.5 - 1


def read_drawings(root: str | Path) -> Drawings:
    """The pictures of a folder in SynCPR's layout, small."""
    from tbps_common.datasets import load_syncpr
    from tbps_common.images import read_image

    captions: dict[str, str] = {}
    for record in load_syncpr(root):
        captions[record.reference_image_path] = record.reference_caption or ""
        captions[record.target_image_path] = record.target_caption or ""
    pixels = [np.asarray(read_image(path).resize((SIDE // 2, SIDE))) for path in captions]
    return Drawings(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), list(captions.values()))


def write_taught_models(out: str | Path, root: str | Path, words: Sequence[str], updates: int, seed: int) -> list[Path]:
    """Write `sd` and `clip`, trained on the pictures of `root`.

    Args:
        out: folder that receives them.
        root: pictures with captions in SynCPR's layout.
        words: of the tokenizers.
        updates: of the denoiser; the auto-encoder and CLIP get half as many each.
        seed: of everything.
    """
    drawings = read_drawings(root)
    folders = [Path(out) / "sd", Path(out) / "clip"]
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        clip, tokenizer, processor = clip_model(words, image_size=SIDE, patch_size=8, width=64)
        _teach_clip(clip, tokenizer, processor, drawings, updates // 2)
        for part in (clip, tokenizer, processor):
            part.save_pretrained(folders[1])
        pipeline = stable_diffusion(
            words, widths=(32, 64), vae_widths=(8, 16, 32), text_width=64, text_layers=2, length=_LONGEST_PROMPT
        )
        _teach_auto_encoder(pipeline.vae, drawings, updates // 2)
        _teach_denoiser(pipeline, drawings, updates)
        pipeline.save_pretrained(folders[0])
    return folders


def _teach_clip(model: Any, tokenizer: Any, processor: Any, drawings: Drawings, updates: int) -> None:
    """Symmetric cross-entropy over the batch's cosines (Radford et al. 2021, section 2.3)."""
    tokens = _tokens(tokenizer, drawings.captions, 77)
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    canvas = torch.tensor(PADDING, dtype=torch.uint8).view(1, 3, 1, 1)  # as `square` pads

    def loss(batch: Tensor) -> Tensor:
        pictures = canvas.repeat(len(batch), 1, SIDE, SIDE)
        pictures[..., SIDE // 4 : SIDE - SIDE // 4] = drawings.pixels[batch]
        pixels = (pictures.float() / 255 - mean) / deviation
        logits = model(pixel_values=pixels, **{name: value[batch] for name, value in tokens.items()}).logits_per_image
        own = torch.arange(len(batch))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    _train("CLIP", model.parameters(), loss, len(drawings.captions), updates, 1e-3)
    model.eval()


def _teach_auto_encoder(vae: Any, drawings: Drawings, updates: int) -> None:
    def loss(batch: Tensor) -> Tensor:
        pixels = drawings.wide(batch, batch.roll(1))
        posterior = vae.encode(pixels).latent_dist
        made = vae.decode(posterior.sample()).sample
        return F.l1_loss(made, pixels) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    start_as_mean_colours(vae)
    _train("auto-encoder", vae.parameters(), loss, len(drawings.captions), updates, 2e-3)
    vae.eval()
    with torch.no_grad():
        some = torch.arange(min(64, len(drawings.captions)))
        spread = vae.encode(drawings.wide(some, some.roll(1))).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(1 / float(spread), 5))


def _teach_denoiser(pipeline: Any, drawings: Drawings, updates: int) -> None:
    """Denoising as in `NoisePrediction`, with the text encoder trained along."""
    from diffusers import DDPMScheduler

    schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet, reader, vae = pipeline.unet, pipeline.text_encoder, pipeline.vae
    count = len(drawings.captions)

    def loss(batch: Tensor) -> Tensor:
        others = torch.randint(count, (len(batch),))  # somebody else on the right
        with torch.no_grad():
            latents = vae.encode(drawings.wide(batch, others)).latent_dist.mean * vae.config.scaling_factor
        prompts = [
            "" if float(torch.rand(())) < 0.1 else image_prompt(TEMPLATE, drawings.captions[i], drawings.captions[j])
            for i, j in zip(batch.tolist(), others.tolist())
        ]
        texts = reader(**_tokens(pipeline.tokenizer, prompts, _LONGEST_PROMPT)).last_hidden_state
        noise = torch.randn_like(latents)
        times = torch.randint(schedule.config.num_train_timesteps, (len(batch),))
        predicted = unet(schedule.add_noise(latents, noise, times), times, encoder_hidden_states=texts).sample
        return F.mse_loss(predicted, noise)

    _train("denoiser", [*unet.parameters(), *reader.parameters()], loss, count, updates, 1e-3)
    unet.eval()
    reader.eval()


def _train(
    name: str,
    parameters: Any,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    updates: int,
    rate: float,
) -> None:
    from tqdm import tqdm

    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3)
    recent: list[float] = []
    with tqdm(total=updates, desc=name, unit="update", dynamic_ncols=True, disable=None) as progress:
        for update, batch in zip(range(updates), _batches(count)):
            share = update / max(updates, 1)
            for group in optimizer.param_groups:  # a short rise, then a cosine
                group["lr"] = rate * min(1.0, (update + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
            loss = loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            recent = [*recent[-49:], float(loss.detach())]
            progress.update()
    if recent:
        print(
            f"{name}: loss {sum(recent) / len(recent):.4f} (mean of the last {len(recent)} of {updates} updates)",
            flush=True,
        )


def _batches(count: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count).split(min(_BATCH, count))


def _tokens(tokenizer: Any, texts: list[str], longest: int) -> dict[str, Tensor]:
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
    return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}
