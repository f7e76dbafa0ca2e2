"""New persons from descriptions with reference images, and edits of existing images.

producer = Producer(DiversePersonPipeline.from_pretrained("editor"))
(image,) = producer.new([NewTask("a woman with gold hair<|image|>", (Path("gold_hair.png"),))])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_gen.generation.produce import Producer, Sampling
    from dp_gen.generation.tasks import EditTask, NewTask

__all__ = ["EditTask", "NewTask", "Producer", "Sampling"]


def __getattr__(name: str) -> Any:
    """Import on first use: tasks are planned without torch."""
    import importlib

    if name in ("Producer", "Sampling"):
        return getattr(importlib.import_module("dp_gen.generation.produce"), name)
    if name in ("EditTask", "NewTask"):
        return getattr(importlib.import_module("dp_gen.generation.tasks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
