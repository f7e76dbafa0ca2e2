"""New persons from descriptions with reference images, and edits of existing images.

producer = Producer(DiversePersonPipeline.from_pretrained("editor"))
(image,) = producer.new([NewTask("a woman with gold hair<|image|>", (Path("gold_hair.png"),))])
"""

import lazy_loader

# On first use: tasks are planned without torch. The names stand in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
