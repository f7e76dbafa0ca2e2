"""How well a model's attention finds the attributes: losses on fixed random numbers, and a picture before and after."""

import argparse
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_gen.data import DiversePersonDataset, collate_fn
from dp_gen.losses import attribute_localization_loss, masked_mse
from dp_gen.model import DiversePersonModel
from dp_gen.model.attention import attention_grids
from tbps_common.files import atomic_path

TIMESTEPS = (100, 300, 500, 700, 900)


@dataclass
class AttentionReport:
    """What `examine` found.

    Attributes:
        denoise_loss: mean squared error of the noise (or v), over samples and timesteps, nothing masked.
        localization_loss: of the supervised layers; negative where the attention is right.
        inside: [n, N] share of each attribute's attention that lies inside its region; NaN for unused slots. Attention
            that is spread evenly has the share of the image that the region covers.
        images: [n, 3, R, R] in [0, 1], of the first samples.
        regions: [n, N, R, R], 0 or 1.
        maps: [n, N, R, R], mean attention over layers, heads and timesteps.
        labels: of the attributes in the slots of each sample.
    """

    denoise_loss: float
    localization_loss: float
    inside: Tensor
    images: Tensor
    regions: Tensor
    maps: Tensor
    labels: list[list[str]]

    @property
    def numbers(self) -> dict[str, float]:
        """The three numbers, for a JSON file."""
        return {
            "denoise_loss": self.denoise_loss,
            "localization_loss": self.localization_loss,
            "attention_inside": float(self.inside.nanmean()),
        }


@torch.no_grad()
def examine(
    model: DiversePersonModel,
    dataset: DiversePersonDataset,
    noise_scheduler: Any,
    *,
    samples: int = 24,
    seed: int = 0,
) -> AttentionReport:
    """Losses and attention of evenly spaced samples, at five timesteps, with noise that depends on `seed` alone.

    Args:
        model: built with `attribute_loc`; only its supervised layers are looked at.
        dataset: its items are taken without mirroring.
        noise_scheduler: diffusers' `DDPMScheduler`.
        samples: how many, about.
        seed: of noise and backgrounds.
    """
    if model.capture is None:
        raise ValueError("the model captures no attention: build it with attribute_loc")
    generator = torch.Generator().manual_seed(seed)
    items, labels = [], []
    for index in range(0, len(dataset), max(1, len(dataset) // samples)):
        loaded = dataset.load(index)
        background = torch.randint(0, 255, loaded[0].shape, dtype=torch.uint8, generator=generator)
        items.append(dataset.preprocess(*loaded, flip=False, background=background))
        segments = [s for s in loaded[1]["segments"] if dataset.types is None or s["label"] in dataset.types]
        named = [str(segment["label"]) for segment in sorted(segments, key=lambda segment: segment["end"])]
        labels.append(named[: int(items[-1]["reference_attribute_num"])])
    batch = collate_fn(items)
    condition = model.encode_condition(batch)
    resolution = batch["pix_v"].shape[-1]
    shape = (len(items), 4, resolution // 8, resolution // 8)
    latents = model.encode_latents(batch["pix_v"], torch.randn(shape, generator=generator))
    maps = torch.zeros_like(batch["attribute_seg_maps"])
    losses = torch.zeros(2)
    for step in TIMESTEPS:
        noise = torch.randn(shape, generator=generator)
        steps = torch.full((len(items),), step)
        with model.capture.recording() as attention:
            found = model.unet(noise_scheduler.add_noise(latents, noise, steps), steps, condition).sample
        grids = attention_grids(model.unet, list(attention), *shape[-2:])
        located = attribute_localization_loss(
            attention,
            batch["attribute_seg_maps"],
            batch["img_token_idx"],
            batch["img_token_idx_mask"],
            spatial_shape=grids,
        )
        predicts_v = noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, noise, steps) if predicts_v else noise
        losses += torch.stack([masked_mse(found, target), located]) / len(TIMESTEPS)
        for name, probabilities in attention.items():
            columns = probabilities.unflatten(0, (len(items), -1)).mean(dim=1)  # (n, q, L)
            places = batch["img_token_idx"][:, None].expand(-1, columns.shape[1], -1)
            small = columns.gather(2, places).transpose(1, 2).unflatten(2, grids[name])  # (n, N, rows, columns)
            large = F.interpolate(small, size=(resolution, resolution), mode="bilinear", align_corners=False)
            maps += large / (len(TIMESTEPS) * len(attention))
    regions, used = batch["attribute_seg_maps"], batch["img_token_idx_mask"]
    inside = (maps * regions).sum(dim=(2, 3)) / maps.sum(dim=(2, 3))
    return AttentionReport(
        denoise_loss=float(losses[0]),
        localization_loss=float(losses[1]),
        inside=inside.masked_fill(~used, float("nan")),
        images=(batch["pix_v"] + 1) / 2,
        regions=regions,
        maps=maps,
        labels=labels,
    )


def draw_attention(
    path: str | os.PathLike[str], before: AttentionReport, after: AttentionReport, rows: int = 4
) -> None:
    """Write a picture: per sample its image, and per attribute the attention before and after, region outlined.

    Both are drawn on one scale of brightness, that of the stronger.

    Args:
        path: image file to write.
        before: of the untrained model.
        after: of the trained model, on the same samples.
        rows: samples to show; those with the most attributes are taken.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = sorted(range(len(before.images)), key=lambda index: -len(before.labels[index]))[:rows]
    slots = max(len(before.labels[index]) for index in chosen)
    figure = Figure(figsize=(1.7 * (1 + 2 * slots), 1.95 * len(chosen)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(chosen), 1 + 2 * slots, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, index in enumerate(chosen):
        grid[row][0].imshow(before.images[index].permute(1, 2, 0).numpy())
        for slot, label in enumerate(before.labels[index]):
            brightest = max(float(report.maps[index, slot].max()) for report in (before, after))
            for column, report, when in ((1 + 2 * slot, before, "before"), (2 + 2 * slot, after, "after")):
                axes = grid[row][column]
                axes.set_title(f"{label}, {when}: {float(report.inside[index, slot]):.0%}", fontsize=7)
                axes.imshow(report.maps[index, slot].numpy(), cmap="magma", vmin=0, vmax=brightest)
                axes.contour(before.regions[index, slot].numpy(), levels=[0.5], colors="white", linewidths=0.8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80)


def untrained(args: argparse.Namespace, seed: int) -> DiversePersonModel:
    """The model that a training with this seed starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiversePersonModel.from_pretrained(args).eval()
