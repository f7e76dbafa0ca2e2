"""Start weight `diffusion`: a small Stable Diffusion that paints persons of the world as a caption describes them.

It stands for Stable Diffusion 1.5 (DP, SynCPR, DaD). A person is 128 x 64 pixels, 16 x 8 latents; wide pictures hold black
bars left and right, as DP sees persons. Like the real one it has a text encoder that was taught before and is not changed
any more, latents that are painted back by an auto-encoder, and guidance.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tbps_common.pipeline.models import quiet_libraries
from tbps_world.pretrain.people import shots, start_people
from tbps_world.synth.attributes import MENTIONABLE, VALUES
from tbps_world.synth.lexicon import lexicon
from tbps_world.tiny.syncpr import clip_tokenizer
from tbps_world.tiny.vae import start_as_mean_colours

HEIGHT, WIDTH = 128, 64
TEXT_WIDTH = 64
PEOPLE, LEFT_ASIDE, VIEWS = 400, 32, 4
STEPS = 900
"""Updates of the denoiser; auto-encoder and text encoder get shares of it."""
_TEXT_SHARE, _AUTO_ENCODER_SHARE = 0.78, 0.17
_WITHOUT_TEXT = 0.1
SAMPLES = 64
"""Persons that are sampled, at most, to see whether their colours are right."""
_COLOUR_PROBES = {"upper_colour": (slice(34, 54), slice(24, 40)), "lower_colour": (slice(68, 84), slice(24, 40))}
"""Rows and columns where most pictures show a garment, by what its colour is called."""


@dataclass(frozen=True)
class Gallery:
    """Pictures of single persons.

    Attributes:
        pixels: `[N, 3, 128, 64]` uint8.
        captions: some of each.
        facts: what each caption says: code of each mentionable attribute, from 1; 0 where nothing is said.
        colours: name of each picture's true colour, by attribute.
    """

    pixels: Tensor
    captions: list[tuple[str, ...]]
    facts: list[Tensor]
    colours: dict[str, list[str]]


def train(folder: Path, *, seed: int = 0, steps: int | None = None) -> dict[str, float]:
    """Train the model and write it in diffusers' layout.

    Args:
        folder: receives it.
        seed: of everything.
        steps: updates of the denoiser.

    Returns:
        Errors, and the share of sampled persons whose garments have the colours of their captions, beside that of real
        pictures, which the same rule judges.
    """
    steps = steps or STEPS
    people = start_people(PEOPLE + LEFT_ASIDE)
    gallery, unseen = gallery_of(people[LEFT_ASIDE:]), gallery_of(people[:LEFT_ASIDE])
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        pipeline = _untrained()
        figures = {"text_accuracy": _teach_text(pipeline, gallery, unseen, math.ceil(steps * _TEXT_SHARE))}
        figures["vae_error"] = _teach_auto_encoder(
            pipeline.vae, gallery, unseen, math.ceil(steps * _AUTO_ENCODER_SHARE)
        )
        figures["denoise_loss"] = _teach_denoiser(pipeline, gallery, steps)
        figures.update(colours_followed(pipeline, gallery, unseen, seed=seed))
        pipeline.save_pretrained(folder)
    return figures


def gallery_of(people: Sequence[Any]) -> Gallery:
    """Draw everybody from all sides, with captions."""
    drawn = list(shots(people, views=VIEWS, height=HEIGHT))
    pixels = torch.from_numpy(np.stack([shot.drawing.picture for shot in drawn])).permute(0, 3, 1, 2).contiguous()
    return Gallery(
        pixels,
        [tuple(caption.text for caption in shot.captions) for shot in drawn],
        [torch.stack([_codes(caption.facts) for caption in shot.captions]) for shot in drawn],
        {name: [getattr(shot.person, name) for shot in drawn] for name in _COLOUR_PROBES},
    )


def _codes(facts: dict[str, str]) -> Tensor:
    return torch.tensor([VALUES[name].index(facts[name]) + 1 if name in facts else 0 for name in MENTIONABLE])


def _untrained() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer(lexicon())
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=1.0,
        )
    )
    # The stages of Stable Diffusion, without attention at the finest one: that is most of the time.
    unet = UNet2DConditionModel(
        sample_size=HEIGHT // 8,
        block_out_channels=(32, 96, 96, 96),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    settings: dict[str, Any] = {  # the library declares tuples of one width
        "block_out_channels": (8, 16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = AutoencoderKL(
        **settings,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=HEIGHT,
        mid_block_add_attention=False,
    )
    # Noise to the very end (Lin et al. 2024): else every sample has the mean brightness of the pictures.
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, **absent
    )


def _teach_text(pipeline: Any, gallery: Gallery, unseen: Gallery, updates: int) -> float:
    """Teach the text encoder to know at its last token what a caption says; returns the share it knows of new ones."""
    reader = pipeline.text_encoder
    sizes = [len(VALUES[name]) + 1 for name in MENTIONABLE]
    heads = nn.Linear(TEXT_WIDTH, sum(sizes))
    ids, facts = _read(pipeline.tokenizer, gallery)

    def answers(tokens: Tensor) -> tuple[Tensor, ...]:
        states = reader(input_ids=tokens).last_hidden_state
        ends = (tokens == pipeline.tokenizer.eos_token_id).int().argmax(dim=1)
        known = torch.stack([states[torch.arange(len(tokens)), ends], states[:, -1]])
        return heads(known).split(sizes, dim=-1)

    def loss(batch: Tensor) -> Tensor:
        found = answers(ids[batch])
        said = facts[batch].repeat(2, 1)
        parts = [F.cross_entropy(answer.flatten(0, 1), said[:, place]) for place, answer in enumerate(found)]
        return torch.stack(parts).mean()

    fit("text encoder", [reader, heads], loss, len(ids), updates, batch=32, rate=3e-3)
    ids, facts = _read(pipeline.tokenizer, unseen)
    with torch.no_grad():
        found = torch.stack([answer[0].argmax(dim=-1) for answer in answers(ids)], dim=1)
    said = facts > 0
    return float((found == facts)[said].float().mean())


def _read(tokenizer: Any, gallery: Gallery) -> tuple[Tensor, Tensor]:
    texts = [caption for captions in gallery.captions for caption in captions]
    return _tokens(tokenizer, texts), torch.cat(gallery.facts)


def _teach_auto_encoder(vae: Any, gallery: Gallery, unseen: Gallery, updates: int) -> float:
    """Start from the mean colours of 8 x 8 pixels and learn the detail; returns the squared error of new pictures."""

    def loss(batch: Tensor) -> Tensor:
        pixels = gallery.pixels[batch].float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        made = vae.decode(posterior.sample()).sample
        return F.l1_loss(made, pixels) + F.mse_loss(made, pixels) + 1e-6 * posterior.kl().mean()

    start_as_mean_colours(vae)
    fit("auto-encoder", [vae], loss, len(gallery.pixels), updates, batch=8, rate=3e-3)
    with torch.no_grad():
        pixels = unseen.pixels.float() / 127.5 - 1
        means = vae.encode(pixels).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / float(means.std()), 5))
        return float(F.mse_loss(vae.decode(means).sample, pixels))


def _teach_denoiser(pipeline: Any, gallery: Gallery, updates: int) -> float:
    """Denoising with latents and text features that are made once; every third batch has bars at both sides."""
    from diffusers import DDPMScheduler

    schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet, vae, tokenizer = pipeline.unet, pipeline.vae, pipeline.tokenizer
    with torch.no_grad():
        narrow = encoded(vae, gallery.pixels)
        wide = encoded(vae, F.pad(gallery.pixels, (WIDTH // 2, WIDTH // 2)))
        texts = [caption for captions in gallery.captions for caption in captions]
        parts = [_tokens(tokenizer, ["", *texts][first : first + 64]) for first in range(0, len(texts) + 1, 64)]
        features = torch.cat([pipeline.text_encoder(input_ids=part).last_hidden_state.half() for part in parts])
    firsts = np.cumsum([1, *(len(captions) for captions in gallery.captions)])
    number = 0

    def loss(batch: Tensor) -> Tensor:
        nonlocal number
        number += 1
        if number % 3:
            latents = narrow[batch]
        else:
            batch = batch[: len(batch) // 2]
            latents = wide[batch]
        rows = [int(firsts[place]) + int(torch.randint(len(gallery.captions[place]), ())) for place in batch.tolist()]
        read = torch.tensor(rows) * (torch.rand(len(batch)) >= _WITHOUT_TEXT)
        noise, times = torch.randn_like(latents), torch.randint(1000, (len(batch),))
        found = unet(schedule.add_noise(latents, noise, times), times, features[read].float()).sample
        return F.mse_loss(found, schedule.get_velocity(latents, noise, times))

    return fit("denoiser", [unet], loss, len(narrow), updates, batch=32, rate=2e-3)


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """Latents of pictures `[N, 3, H, W]` uint8, with the auto-encoder's scale."""
    parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pixels.split(32)]
    return torch.cat(parts) * vae.config.scaling_factor


def colours_followed(pipeline: Any, gallery: Gallery, unseen: Gallery, *, seed: int) -> dict[str, float]:
    """Share of samples and of real pictures whose garments' colours are nearest to those that belong to them.

    A garment's colour is the mean over a patch where most pictures show it, and is compared with the mean patches of the
    training pictures of each colour.
    """
    pipeline.set_progress_bar_config(disable=True)
    told = {name: MENTIONABLE.index(name) for name in _COLOUR_PROBES}
    telling = [
        (place, caption)
        for place, facts in enumerate(unseen.facts)
        for caption, row in enumerate(facts)
        if all(row[code] for code in told.values())
    ]
    chosen = telling[:: -(-len(telling) // SAMPLES)]
    prompts = [unseen.captions[place][caption] for place, caption in chosen]
    generator = torch.Generator().manual_seed(seed)
    made = pipeline(
        prompts, height=HEIGHT, width=WIDTH, num_inference_steps=20, guidance_scale=3.0, generator=generator,
        output_type="pt",
    ).images  # fmt: skip
    figures = {}
    for name, where in _COLOUR_PROBES.items():
        colours = sorted(set(gallery.colours[name]))
        patches = _patch_means(gallery.pixels, where)
        centres = torch.stack(
            [patches[[own == colour for own in gallery.colours[name]]].mean(dim=0) for colour in colours]
        )
        numbers = {colour: number for number, colour in enumerate(colours)}
        wanted = torch.tensor([numbers.get(unseen.colours[name][place], -1) for place, _ in chosen])
        for kind, pictures in (("sampled", made * 255), ("real", unseen.pixels[[place for place, _ in chosen]])):
            nearest = torch.cdist(_patch_means(pictures, where), centres).argmin(dim=1)
            figures[f"{name}_{kind}"] = float((nearest == wanted).float().mean())
    return figures


def _patch_means(pixels: Tensor, where: tuple[slice, slice]) -> Tensor:
    return pixels[(..., *where)].float().mean(dim=(2, 3))


def _tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def fit(
    name: str,
    models: Sequence[nn.Module],
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    updates: int,
    *,
    batch: int,
    rate: float,
) -> float:
    """AdamW with a short rise and a cosine; returns the mean loss of the last tenth."""
    from tqdm import tqdm

    parameters = [parameter for model in models for parameter in model.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda update: min(1.0, (update + 1) / 30) * (0.02 + 0.49 * (1 + math.cos(math.pi * update / updates))),
    )
    losses = []
    with tqdm(total=updates, desc=name, unit="update", dynamic_ncols=True, disable=None) as progress:
        for _, chosen in zip(range(updates), _batches(count, batch)):
            loss = loss_of(chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
            losses.append(float(loss.detach()))
            progress.update()
    for model in models:
        model.eval()
    recent = losses[-max(1, updates // 10) :]
    print(f"{name}: loss {losses[0]:.4f} -> {sum(recent) / len(recent):.4f} in {updates} updates", flush=True)
    return sum(recent) / len(recent)


def _batches(count: int, batch: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count).split(batch)[: max(1, count // batch)]  # whole ones, unless there is none
