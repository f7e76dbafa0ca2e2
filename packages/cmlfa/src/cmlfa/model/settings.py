"""What the flags decide about the network; and how a flag is declared: default, help and check in one place."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self

from tbps_common.errors import InputError
from tbps_common.run.arguments import number, whole_number

LOSSES = ("mlm", "cmpm", "id", "itc", "sdm")
LFA_ATTENTION = ("batch", "parts")
PRECISIONS = ("auto", "fp16", "fp32", "amp")
DEVICES = ("auto", "cuda", "cpu")

AUTHORS = "model (the authors' flags)"
ADDED = "additions of this project (the defaults reproduce the released code)"


def flag(default: Any, help: str, *, group: str = AUTHORS, **argparse_settings: Any) -> Any:
    """A dataclass field that is a command-line flag too, under its own name.

    Args:
        default: value of the field and of the flag; `False` makes a switch.
        help: of the flag.
        group: heading of the flag in `--help`.
        **argparse_settings: for `add_argument`; `type` and `choices` also check values that come from a file.
    """
    return field(default=default, metadata={"group": group, "argparse": {"help": help, **argparse_settings}})


def problem_of(option: Field[Any], value: Any) -> str | None:
    """Why `value` cannot be the value of a field of `flag`, or None."""
    settings = option.metadata["argparse"]
    if isinstance(option.default, bool):
        return None if isinstance(value, bool) else f"expects true or false, not {value!r}"
    parts = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(option.default, tuple):
        if parts is not value or not parts or any(type(part) is not int for part in parts):
            return f"expects a list of whole numbers, not {value!r}"
    elif parts is value or isinstance(value, (dict, bool)) or value is None:
        return f"expects a single value, not {value!r}"
    parse = settings.get("type")
    try:
        if option.name == "img_size":
            image_size(",".join(map(str, parts)))
        elif parse is not None:
            for part in parts:
                parse(str(part))
    except (argparse.ArgumentTypeError, ValueError) as error:
        return str(error)
    choices = settings.get("choices")
    return None if choices is None or value in choices else f"must be one of {', '.join(choices)}, not {value!r}"


def image_size(text: str) -> tuple[int, int]:
    """`384,128`, `384 128` or `(384,128)`, height first."""
    match = re.fullmatch(r"[\[(]?\s*(\d+)\s*[,x\s]\s*(\d+)\s*,?\s*[\])]?", text.strip())
    if not match or not all(int(side) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"expects height,width in pixels such as 384,128, not {text!r}")
    return int(match[1]), int(match[2])


def split_losses(text: str) -> list[str]:
    """`'sdm + id'` -> `['sdm', 'id']`."""
    return [name.strip() for name in text.split("+") if name.strip()]


def loss_names(text: str) -> str:
    """A `+`-joined subset of the losses, kept as it was written."""
    names = split_losses(text)
    unknown = ", ".join(repr(name) for name in names if name not in LOSSES)
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"expects losses out of {', '.join(LOSSES)} joined by '+', not {unknown or 'nothing'}"
        )
    return text


@dataclass
class ModelSettings:
    """The flags that shape the network and its loss. Defaults are those of the released code."""

    pretrain_choice: str = flag(
        "ViT-B/16",
        "OpenAI CLIP by name, a file of CLIP weights, or a checkpoint of CMLFA (file, hub folder or hub name)",
    )
    img_size: tuple[int, int] = flag((384, 128), "image height and width", nargs="+", metavar="H,W")
    stride_size: int = flag(16, "stride of the image patches", type=whole_number(1))
    text_length: int = flag(77, "tokens per caption", type=whole_number(3))
    vocab_size: int = flag(49408, "size of the MLM head", type=whole_number(1))
    loss_names: str = flag("sdm+id+mlm", f"losses out of {', '.join(LOSSES)} joined by '+'", type=loss_names)
    temperature: float = flag(0.02, "temperature of all similarities; constant", type=number(0, above=True))
    cmt_depth: int = flag(4, "layers of the cross-modal transformer", type=whole_number(1))
    mlm_loss_weight: float = flag(1.0, "weight of the masked-language loss", type=number(0))
    id_loss_weight: float = flag(
        0.5, "weight of the identity loss (the released code ignores its flag and always uses 0.5)", type=number(0)
    )
    itc_loss_weight: float = flag(5.0, "weight of the ITC loss", group=ADDED, type=number(0))
    num_prototypes: int = flag(9, "learnable prototypes (LFA)", group=ADDED, type=whole_number(1))
    lfa_layers: int = flag(6, "layers of the shared transformer", group=ADDED, type=whole_number(1))
    lfa_heads: int = flag(8, "heads of the shared transformer", group=ADDED, type=whole_number(1))
    lfa_dropout: float = flag(0.3, "dropout of the LFA's feed-forward block", group=ADDED, type=number(0, 1))
    lfa_attention: str = flag(
        "batch",
        "what the shared transformer attends over: the samples of the batch (released code: features depend on the "
        "batch they are computed in) or the prototypes' slots of one sample (the paper's figure)",
        group=ADDED,
        choices=LFA_ATTENTION,
    )
    precision: str = flag(
        "auto",
        "auto: fp16 weights on a GPU as released, fp32 on the CPU; amp: fp32 weights under autocast",
        group=ADDED,
        choices=PRECISIONS,
    )
    device: str = flag("auto", "auto: a GPU if there is one", group=ADDED, choices=DEVICES)

    @classmethod
    def of(cls, args: Any) -> Self:
        """Take the fields of this class from a namespace or a mapping of flags.

        A flag that is absent takes its default: a `configs.yaml` of the authors knows nothing of this project's flags.

        Raises:
            InputError: a value that its flag does not allow.
        """
        flags = args if isinstance(args, Mapping) else vars(args)
        settings = cls()
        for option in fields(cls):
            value = flags.get(option.name)
            if value is None:
                continue
            problem = problem_of(option, value)
            if problem is not None:
                raise InputError(f"--{option.name} {problem}")
            setattr(settings, option.name, tuple(value) if isinstance(value, list) else value)
        return settings

    @property
    def losses(self) -> frozenset[str]:
        """The enabled losses: `loss_names` split at `+`, blanks ignored."""
        return frozenset(split_losses(self.loss_names))

    @property
    def has_classifier(self) -> bool:
        """Whether the checkpoint holds a classifier: the released code looks for the letters `id` in the string."""
        return "id" in self.loss_names

    @property
    def has_mlm(self) -> bool:
        """Whether the checkpoint holds the cross-modal encoder: the released code looks for `mlm` in the string."""
        return "mlm" in self.loss_names
