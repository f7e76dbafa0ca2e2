"""The layout of the Hugging Face hub: `save_pretrained`, `from_pretrained` and `push_to_hub` by huggingface_hub's own mixin.

A folder holds `config.json`, `model.safetensors` with the names of the authors' checkpoints, the tokenizer, and a model card.
"""

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from tbps_common.errors import CheckpointError, InputError
from tbps_common.files import atomic_path, write_json, write_text
from tbps_common.models.source import HUB_CONFIG, HUB_FILES, HUB_WEIGHTS, fetch
from tbps_common.report.evaluation import read_evaluation
from tbps_common.run.checkpoint import load_checkpoint_file

CARD_NAME = "README.md"
_DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_CARD = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Use

```
{{ command }}
```

or in Python `{{ loading }}`.

## Data

{{ data }}

## Metrics

{{ metrics }}

## Citation

{{ citation }}
"""


@dataclass(frozen=True)
class Card:
    """What the model card of a paper says.

    Attributes:
        title: name of the paper and method.
        summary: what the model does.
        command: shell command that uses it, with FOLDER for its place.
        loading: Python expression that loads it, likewise.
        data: what it is trained on, and on what terms.
        citation: a sentence, or a BibTeX entry in a code block.
    """

    title: str
    summary: str
    command: str
    loading: str
    data: str
    citation: str

    def text(self, evaluation: str | os.PathLike[str] | None = None) -> str:
        """The card, with the metrics of an evaluation file if there is one."""
        metrics = "Not evaluated yet." if evaluation is None else _metrics(read_evaluation(evaluation))
        card_data = ModelCardData(library_name="pytorch", tags=["person-retrieval", "text-to-image-retrieval"])
        parts = {name: getattr(self, name) for name in ("title", "summary", "command", "loading", "data", "citation")}
        return str(ModelCard.from_template(card_data, template_str=_CARD, metrics=metrics, **parts))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a package's `to_hub` brings into the layout of the hub.

    Attributes:
        path: its place.
        state: its weights.
        beside: what else it holds.
        config: file or name that says how the model was trained (`--config`), or None for what is beside or inside it.
        tokenizer: folder of the tokenizer (`--tokenizer`), or None for the one that the configuration names.
    """

    path: Path
    state: Mapping[str, Tensor]
    beside: Mapping[str, Any]
    config: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class HubParts:
    """What a folder in the layout of the hub is made of.

    Attributes:
        state: weights under the names of the authors' checkpoints.
        config: content of `config.json`.
        tokenizer: name of a file -> its content.
        card: what the model card says.
        evaluation: file with the metrics for the card.
    """

    state: Mapping[str, Tensor]
    config: dict[str, Any]
    tokenizer: Mapping[str, str]
    card: Card
    evaluation: Path | None = None


@dataclass(frozen=True)
class Encoder:
    """A part of a model that gives features, for the export.

    Attributes:
        name: of the file.
        model: float32, on the CPU, in evaluation mode.
        call: the model and its inputs to unit-norm features.
        inputs: size of a batch -> random inputs by name, of the form the model is used with.
        note: what a user has to know.
    """

    name: str
    model: nn.Module
    call: Callable[..., Tensor]
    inputs: Callable[[int], dict[str, Tensor]]
    note: str


class HubModel(PyTorchModelHubMixin):
    """A network whose weights have the authors' names in a folder in the layout of the hub."""

    @abstractmethod
    def hub_parts(self) -> HubParts:
        """This model as a folder in the layout of the hub."""

    @classmethod
    @abstractmethod
    def from_hub(cls, folder: Path, config: dict[str, Any], state: Mapping[str, Tensor]) -> Self:
        """The model of such a folder, on the CPU.

        Raises:
            InputError: configuration, tokenizer or weights do not fit together.
        """

    def _save_pretrained(self, save_directory: Path) -> None:
        write_hub_folder(save_directory, self.hub_parts())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        asked = {name: options[name] for name in _DOWNLOAD if options.get(name) is not None}
        folder = Path(model_id) if os.path.isdir(model_id) else fetch(model_id, HUB_FILES, model_id, **asked)
        content = load_checkpoint_file(folder)
        model = cls.from_hub(folder, content["config"], content["model"])
        assert isinstance(model, nn.Module)
        model.eval()
        return model


def evaluation_of(checkpoint: Path, folder: Path) -> Path | None:
    """The evaluation file in a folder that measured a checkpoint, if there is one; that of the test split before others."""
    for path in sorted(folder.glob("evaluation*.json"), key=lambda path: ("test" not in path.name, path.name)):
        try:
            measured = read_evaluation(path)["checkpoint"]
        except InputError:
            continue
        if measured is not None and Path(measured).name == checkpoint.name:
            return path
    return None


def write_hub_folder(folder: Path, parts: HubParts) -> None:
    """Write a folder, each file whole or not at all, and `config.json` last: a folder with it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / HUB_WEIGHTS, parts.state)
    for name, content in parts.tokenizer.items():
        write_text(folder / name, content)
    write_text(folder / CARD_NAME, parts.card.text(parts.evaluation))
    write_json(folder / HUB_CONFIG, parts.config)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; of tensors that are one and the same, the first, and under which names it goes, too.

    `tbps_common.run.checkpoint.load_checkpoint_file` and safetensors' own `load_model` understand that.

    Raises:
        CheckpointError: `state` holds something that such a file cannot.
    """
    kept: dict[str, Tensor] = {}
    twins: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            twins[name] = first[place]
            continue
        first[place] = name
        own = tensor.detach().cpu().contiguous()
        # A part of a larger tensor would be written as if it shared its memory with the others.
        kept[name] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
    try:
        with atomic_path(path) as temporary:
            save_file(kept, temporary, metadata={"format": "pt", **twins})
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be written as safetensors: {error}") from error


def _metrics(document: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in document["metrics"].values() for name in row))
    lines = [f"| task | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for task, row in document["metrics"].items():
        lines.append(f"| {task} | {' | '.join(f'{row[name]:.2f}' if name in row else '-' for name in names)} |")
    counts = document["counts"]
    where = (
        f"{document['dataset']}, {document['split']} split: {counts['queries']} queries, {counts['gallery']} images."
    )
    return "\n".join([where, "", *lines])
