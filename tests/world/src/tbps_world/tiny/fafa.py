"""Everything a first run needs, made on the spot: a tiny model's description and a handful of pictures.

`fafa-make-tiny DIR` writes into DIR

* `vocab.txt` and `tiny.yaml`: for `--backbone DIR/tiny.yaml`;
* `syncpr/`: 16 training triplets of 384 x 192 pixels (`--syncpr-data-path`);
* `itcpr/`: 4 queries and 5 gallery images (`--itcpr-root`).

`fafa-make-tiny DIR --for pedestrians` writes only a model, of a size and vocabulary that learns from `tbps-synth`.
`fafa-toy` (`tbps_world.toys.fafa`) uses it.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbps_common.files import atomic_path, write_text

if TYPE_CHECKING:
    from PIL import Image

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
COLOURS = {
    "red": (200, 30, 30),
    "blue": (30, 50, 200),
    "black": (25, 25, 25),
    "white": (235, 235, 235),
}
GARMENTS = ("shirt", "coat")
WORDS = (
    *COLOURS, *GARMENTS,
    "a", "the", "man", "woman", "person", "now", "wearing", "with", "in", "and", "carrying", "bag", ",", "'", "-",
    "##s", "##ing", "##ed",
)  # fmt: skip
TRIPLETS = 16
QUERIES = 4
TINY_MODEL: dict[str, Any] = {
    "arch": "tiny",
    "load_pretrained": False,
    "vit_model": "eva_clip_g",
    "image_size": 28,
    "vit_width": 32,
    "vit_depth": 2,
    "vit_heads": 4,
    "vit_precision": "fp32",
    "num_query_token": 8,
    "embed_dim": 16,
    "max_txt_len": 16,
    "qformer": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
    "mfr_hidden_dim": 24,
}
# Starts from random weights, so its ViT is trained. The usual standard deviation of 0.02 is far too small for this
# width: with it the features of all images stay the same for hundreds of steps.
PEDESTRIAN_MODEL: dict[str, Any] = {
    "arch": "toy",
    "load_pretrained": False,
    "vit_model": "eva_clip_g",
    "image_size": 96,
    "patch_size": 12,
    "vit_width": 64,
    "vit_depth": 2,
    "vit_heads": 2,
    "vit_precision": "fp32",
    "freeze_vit": False,
    "num_query_token": 16,
    "cross_attention_freq": 2,
    "embed_dim": 64,
    "max_txt_len": 24,
    "qformer": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
    },
    "mfr_hidden_dim": 64,
}


def write_tiny_model(folder: Path, settings: Mapping[str, Any], words: Iterable[str]) -> Path:
    """Write `vocab.txt` and `tiny.yaml`, the description of a model of random weights.

    Args:
        folder: where to write; it is created.
        settings: content of `model:` but for the tokenizer.
        words: the vocabulary beside the special tokens.

    Returns:
        Path of the YAML file, for `--backbone`.

    Raises:
        InputError: the settings do not make a model.
        OSError: a file cannot be written.
    """
    import yaml

    from fafa.model.settings import ModelSettings

    content = {**settings, "tokenizer": "vocab.txt"}
    ModelSettings.from_mapping(content, "the tiny model")
    lines = [*SPECIAL_TOKENS, *dict.fromkeys(words)]
    write_text(folder / "vocab.txt", "\n".join(lines) + "\n")
    path = folder / "tiny.yaml"
    write_text(path, yaml.safe_dump({"model": content}, sort_keys=False))
    return path


def pedestrian_words() -> list[str]:
    """The vocabulary of `tbps-synth`; the tokenizer splits words at hyphens."""
    from tbps_world.synth.lexicon import lexicon

    return ["-", ",", "'", *(part for word in lexicon() for part in word.split("-"))]


def write_toy_data(
    folder: Path, *, triplets: int = TRIPLETS, queries: int = QUERIES, one_instance: bool = False
) -> None:
    """Write `syncpr/` and `itcpr/`: figures whose coat has the colour that the caption asks for.

    Args:
        folder: where to write.
        triplets: training triplets; two in a row show the same change.
        queries: queries, each with one image to find; one gallery image answers none.
        one_instance: give every test image the same instance id, so that R@1 is 100 for any model.
    """
    names = list(COLOURS)
    records = []
    for number in range(triplets):
        change = number // 2
        before, after = names[change % 4], names[(change + 1 + change // 4 % 3) % 4]
        garment = GARMENTS[change // 12 % 2]
        paths = {side: f"test1/sub_img/img_{side}/{number}-0_{side}.png" for side in ("left", "right")}
        for side, colour in (("left", before), ("right", after)):
            _save(_figure(colour, number, 384, 192), folder / "syncpr" / paths[side])
        records.append(
            {
                "reference_caption": f"A person in a {before} {garment}.",
                "target_caption": f"A person in a {after} {garment}.",
                "reference_image_path": paths["left"],
                "target_image_path": paths["right"],
                "edit_caption": f"Now wearing a {after} {garment}.",
                "cpr_id": change,
            }
        )
    write_text(folder / "syncpr" / "SynCPR.json", json.dumps(records, indent=1) + "\n")

    asked, gallery = [], []
    for number in range(queries):
        source, person = ("Celeb-reID", f"{number:03d}") if number % 2 else ("LAST", f"{number + 9:06d}")
        before, after = names[number % 4], names[(number + 2) % 4]
        instance = 1 if one_instance else number + 1
        for view, colour, records_of in ((0, before, asked), (1, after, gallery)):
            name = f"{source}/{person}/{number}_{view}.png"
            _save(_figure(colour, 100 + number, 128, 64), folder / "itcpr" / name)
            record = {"file_path": name, "datasets": source, "person_id": number, "instance_id": instance}
            records_of.append(record)
        asked[-1]["caption"] = f"The person is now wearing a {after} coat."
    name = "LAST/000009/9_9.png"
    _save(_figure("white", 200, 128, 64), folder / "itcpr" / name)
    distractor = 1 if one_instance else -1
    gallery.append({"file_path": name, "datasets": "LAST", "person_id": 9, "instance_id": distractor})
    for file, content in (("query.json", asked), ("gallery.json", gallery)):
        write_text(folder / "itcpr" / file, json.dumps(content, indent=1) + "\n")


def _figure(colour: str, seed: int, height: int, width: int) -> "Image.Image":
    """A figure in a coat of a colour, before a noisy background that differs with the seed."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(90, 150, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    pixels[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = COLOURS[colour]
    pixels[height // 12 : height // 4, width * 3 // 8 : width * 5 // 8] = (222, 180, 150)
    pixels[height * 3 // 4 :, width // 3 : width * 2 // 3] = (60, 60, 70)
    return Image.fromarray(pixels.astype(np.uint8))


def _save(image: "Image.Image", path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary)


def main(argv: list[str]) -> int:
    """`fafa-make-tiny DIR`."""
    parser = argparse.ArgumentParser(
        prog="fafa-make-tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", help="where to write")
    parser.add_argument("--for", dest="purpose", choices=("commands", "pedestrians"), default="commands")
    flags = parser.parse_args(argv)
    folder = Path(flags.folder)
    if flags.purpose == "pedestrians":
        write_tiny_model(folder, PEDESTRIAN_MODEL, pedestrian_words())
        print(f"written to {folder}: tiny.yaml, vocab.txt")
        return 0
    write_tiny_model(folder, TINY_MODEL, WORDS)
    write_toy_data(folder)
    print(f"written to {folder}: tiny.yaml, vocab.txt, syncpr/, itcpr/")
    return 0
