"""The model: text encoder, image encoder, controller, U-Net with captured attention, VAE; its files and folders."""

from dp_gen.model.capture import AttentionCapture, supervised_cross_attentions
from dp_gen.model.controller import MLP, DiversePersonController
from dp_gen.model.diverse_person import DiversePersonModel
from dp_gen.model.pipeline import DiversePersonPipeline
from dp_gen.model.weights import load_checkpoint, official_state_dict

__all__ = [
    "MLP",
    "AttentionCapture",
    "DiversePersonController",
    "DiversePersonModel",
    "DiversePersonPipeline",
    "load_checkpoint",
    "official_state_dict",
    "supervised_cross_attentions",
]
