"""What the flags decide about the network, checked before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tbps_common.errors import InputError

LOSSES = ("mlm", "cmpm", "id", "itc", "sdm")
LFA_ATTENTION = ("batch", "parts")
PRECISIONS = ("auto", "fp16", "fp32", "amp")


@dataclass(frozen=True)
class ModelSettings:
    """The flags that shape the network and its loss. Defaults are those of the released code.

    A flag that is absent (an official `configs.yaml` knows nothing of this project's additions) takes its default.
    """

    pretrain_choice: str = "ViT-B/16"
    img_size: tuple[int, int] = (384, 128)
    stride_size: int = 16
    text_length: int = 77
    vocab_size: int = 49408
    loss_names: str = "sdm+id+mlm"
    temperature: float = 0.02
    cmt_depth: int = 4
    mlm_loss_weight: float = 1.0
    id_loss_weight: float = 0.5
    itc_loss_weight: float = 5.0
    num_prototypes: int = 9
    lfa_layers: int = 6
    lfa_heads: int = 8
    lfa_dropout: float = 0.3
    lfa_attention: str = "batch"
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        unknown = sorted(self.losses - set(LOSSES))
        if unknown or not self.losses:
            raise InputError(
                f"--loss_names {self.loss_names!r} names {', '.join(map(repr, unknown)) or 'no loss'}: "
                f"join some of {', '.join(LOSSES)} with '+'."
            )
        if self.lfa_attention not in LFA_ATTENTION:
            raise InputError(
                f"--lfa_attention must be one of {', '.join(LFA_ATTENTION)}, but it is {self.lfa_attention!r}."
            )
        if self.precision not in PRECISIONS:
            raise InputError(f"--precision must be one of {', '.join(PRECISIONS)}, but it is {self.precision!r}.")
        if len(self.img_size) != 2 or min(self.img_size) < 1:
            raise InputError(f"--img_size must be a height and a width in pixels, but it is {self.img_size}.")
        if self.temperature <= 0:
            raise InputError(f"--temperature must be positive, but it is {self.temperature}.")
        for flag in (
            "stride_size",
            "text_length",
            "vocab_size",
            "cmt_depth",
            "num_prototypes",
            "lfa_layers",
            "lfa_heads",
        ):
            if getattr(self, flag) < 1:
                raise InputError(f"--{flag} must be at least 1, but it is {getattr(self, flag)}.")

    @classmethod
    def from_args(cls, args: Any) -> "ModelSettings":
        """Read the settings from a namespace, an attribute mapping or a plain mapping of flags."""
        flags = args if isinstance(args, Mapping) else vars(args)
        found = {field.name: flags[field.name] for field in fields(cls) if flags.get(field.name) is not None}
        if "img_size" in found:
            found["img_size"] = tuple(int(side) for side in found["img_size"])
        return cls(**found)

    @property
    def losses(self) -> frozenset[str]:
        """The enabled losses: `loss_names` split at `+`, blanks ignored."""
        return frozenset(name.strip() for name in self.loss_names.split("+") if name.strip())

    @property
    def has_classifier(self) -> bool:
        """Whether the checkpoint holds a classifier: the released code looks for the letters `id` in the string."""
        return "id" in self.loss_names

    @property
    def has_mlm(self) -> bool:
        """Whether the checkpoint holds the cross-modal encoder: the released code looks for `mlm` in the string."""
        return "mlm" in self.loss_names
