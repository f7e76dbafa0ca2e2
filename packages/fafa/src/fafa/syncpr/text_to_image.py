"""Any text-to-image pipeline of diffusers, with a LoRA: prompts and seeds in, pictures out."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from tbps_common.errors import InputError
from tbps_common.pipeline.models import first_line, load_model, quiet_libraries, require_effective_lora

_LONGEST_TEXT = 1_000_000  # tokenizers without a limit name a huge number
_ADAPTER = "syncpr"


@dataclass(frozen=True)
class Sampling:
    """How pictures are made.

    Attributes:
        height, width: in pixels, as generated.
        steps: of the sampler.
        guidance: classifier-free or distilled guidance, as the pipeline understands it.
        negative: prompt to keep away from, if the pipeline takes one.
    """

    height: int
    width: int
    steps: int
    guidance: float
    negative: str | None = None


class TextToImage:
    """A pipeline with its LoRA on a device; whatever the family, it is called with what its signature names.

    Attributes:
        pipeline: the diffusers pipeline.
        device: where it computes.
    """

    def __init__(self, pipeline: Any, device: torch.device):
        self.pipeline = pipeline.to(device)
        self.device = device
        self._parameters = inspect.signature(type(pipeline).__call__).parameters
        pipeline.set_progress_bar_config(disable=True)
        self._largest_batch: int | None = None

    @property
    def longest_prompt(self) -> int | None:
        """Tokens that the best reader among the text encoders takes; None if nothing limits them."""
        limits = [tokenizer.model_max_length for tokenizer in self._tokenizers()]
        return max(limits) if limits and max(limits) < _LONGEST_TEXT else None

    def is_cut(self, prompt: str) -> bool:
        """Whether no text encoder reads the prompt to its end."""
        limit = self.longest_prompt
        if limit is None:
            return False
        (reader, *_) = [tokenizer for tokenizer in self._tokenizers() if tokenizer.model_max_length == limit]
        with quiet_libraries():
            return len(reader(prompt, truncation=False).input_ids) > limit

    def paint(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Image.Image | None]:
        """One picture per prompt; None where the pipeline's safety checker blanked it.

        A picture's noise depends on its seed alone, not on the others of the batch. When the memory of the GPU does not
        hold a batch, smaller ones are made from then on.

        Raises:
            InputError: the pipeline refuses the size, or even one picture does not fit into the memory.
        """
        size = min(len(prompts), self._largest_batch or len(prompts))
        pictures: list[Image.Image | None] = []
        while len(pictures) < len(prompts):
            part = slice(len(pictures), len(pictures) + size)
            try:
                pictures += self.paint_at_once(prompts[part], seeds[part], sampling)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise InputError(
                        "one picture does not fit into the GPU's memory: lower --height and --width, or use --dtype bfloat16"
                    ) from error
                torch.cuda.empty_cache()
                size = self._largest_batch = size // 2
                print(f"the GPU's memory holds no larger batch: continuing with {size} pictures at a time", flush=True)
        return pictures

    def paint_at_once(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
    ) -> list[Image.Image | None]:
        """Paint all prompts in one batch, which may not fit into memory."""
        wanted: dict[str, Any] = {
            "height": sampling.height,
            "width": sampling.width,
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance,
            "output_type": "pil",
        }
        if sampling.negative is not None:
            if "negative_prompt" not in self._parameters:
                raise InputError(f"--negative-prompt: {type(self.pipeline).__name__} takes none; leave the flag out")
            wanted["negative_prompt"] = [sampling.negative] * len(prompts)
        # Noise from the CPU's generator is the same on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        given = {name: value for name, value in wanted.items() if name in self._parameters}
        try:
            with quiet_libraries():  # a prompt that is cut would be repeated in full, in every batch
                output = self.pipeline(prompt=list(prompts), generator=generators, **given)
        except ValueError as error:
            raise InputError(f"{type(self.pipeline).__name__} refuses its input: {first_line(error)}") from error
        for picture in output.images:
            if picture.size != (sampling.width, sampling.height):
                raise InputError(
                    f"{type(self.pipeline).__name__} made {picture.width} x {picture.height} pixels instead of "
                    f"{sampling.width} x {sampling.height}: choose a --width and --height that it can make, such as "
                    "multiples of 16"
                )
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(prompts)
        return [None if is_flagged else picture for picture, is_flagged in zip(output.images, flagged)]

    def _tokenizers(self) -> list[Any]:
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith("tokenizer") and part is not None]


def load_pipeline(name: str, revision: str | None, dtype: torch.dtype) -> Any:
    """A text-to-image pipeline of a folder or of the hub.

    Raises:
        InputError: there is none under that name.
    """
    import diffusers

    def load(name: str, **options: Any) -> Any:
        try:
            return diffusers.AutoPipelineForText2Image.from_pretrained(name, **options)
        except ValueError:  # a family that it does not know yet
            return diffusers.DiffusionPipeline.from_pretrained(name, **options)

    pipeline = load_model("--model", name, load, revision=revision, dtype=dtype)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    required = [parameter.name for parameter in parameters.values() if parameter.default is inspect.Parameter.empty]
    if "prompt" not in parameters or "image" in required:
        raise InputError(f"--model {name} is a {type(pipeline).__name__}, which does not make pictures from text")
    return pipeline


def load_lora(pipeline: Any, name: str, scale: float) -> None:
    """Put a LoRA in diffusers' format into the pipeline.

    Args:
        pipeline: receives it.
        name: a safetensors file, a folder that holds `pytorch_lora_weights.safetensors`, or a repository of the hub.
        scale: 1 is as trained.

    Raises:
        InputError: it cannot be read, belongs to another model, or changes nothing.
    """
    load_model("--lora", name, pipeline.load_lora_weights, adapter_name=_ADAPTER)
    require_effective_lora("--lora", name, pipeline)
    # Into the weights, so that a picture costs no more than without it.
    pipeline.set_adapters([_ADAPTER], adapter_weights=[scale])
    pipeline.fuse_lora(adapter_names=[_ADAPTER])
    pipeline.unload_lora_weights()
