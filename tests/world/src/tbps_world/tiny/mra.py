"""`mra-make-tiny`: everything beside the data that the paper's commands need, small and random.

Writes configurations, vocabulary, start weights and checkpoints of the released layout into a folder that `tbps-synth`
has filled with data. Nothing is downloaded, and no command or code path knows of such folders.
"""

import argparse
import copy
import io
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mra.config import TASKS, load_config
from mra.model.settings import PACKAGE
from tbps_common.errors import InputError
from tbps_common.files import atomic_path, write_json, write_text
from tbps_common.run.arguments import HelpFormatter, whole_number

DESCRIPTION = """\
Write small random weights and configurations, so that the paper's commands run without a download and without a GPU:

  tbps-synth --out T --preset tiny --layouts cuhk,icfg,rstp,finetune,sda
  mra-make-tiny --out T --lexicon T/lexicon.txt --seed 0
  cd T
  python3 run.py --task "sda"  --dist "f4" --output_dir "out/pre_sda"

The preset tiny shows that everything runs, and learns next to nothing; toy is what `mra-toy` trains.
"""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXT_CONFIG = "configs/config_bert_tiny.json"
# Where the configurations look for the start weights.
SWIN, BERT = "data/swin_base_patch4_window7_224_22k.pth", "data/bert-base-uncased"

# Words of the synthetic captions that mean the same; only those of the lexicon are written.
SYNONYMS = {
    "man": ["guy", "gentleman", "male"],
    "woman": ["lady", "female"],
    "red": ["crimson"],
    "blue": ["azure"],
    "green": ["emerald"],
    "grey": ["gray"],
    "trousers": ["pants"],
    "backpack": ["rucksack", "knapsack"],
    "phone": ["cellphone", "mobile phone"],
    "coat": ["overcoat"],
    "wearing": ["dressed in"],
    "carrying": ["holding"],
    "young": ["youthful"],
    "short": ["cropped"],
}


@dataclass(frozen=True)
class Preset:
    """Sizes of the networks and the changes to the released YAML files."""

    pretraining_size: tuple[int, int, int]
    """Height, width and window of the images of sda."""
    finetuning_size: tuple[int, int, int]
    vision: dict[str, Any]
    text: dict[str, Any]
    all_tasks: dict[str, Any]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


PRESETS = {
    "tiny": Preset(
        pretraining_size=(96, 96, 3),
        finetuning_size=(192, 128, 2),
        vision={"vision_width": 64, "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]},
        text={
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 12,
            "intermediate_size": 96,
            "max_position_embeddings": 64,
            "fusion_layer": 6,
        },
        all_tasks={
            "embed_dim": 64,
            "batch_size_train": 8,
            "batch_size_test": 16,
            "batch_size_test_text": 64,
            "k_test": 16,
            "schedular.epochs": 1,
        },
        tasks={"sda": {"schedular.num_warmup_steps": 4}, "rstp": {"embed_dim": 256}},
    ),
    "toy": Preset(
        pretraining_size=(128, 64, 2),
        finetuning_size=(128, 64, 2),
        vision={
            "vision_width": 192,
            "embed_dim": 24,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 8],
            "drop_path_rate": 0.0,
        },
        text={
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 80,
            # With BERT's 0.02 so narrow a network attends to everything alike for its first hundreds of steps.
            "initializer_range": 0.08,
            "fusion_layer": 2,
        },
        all_tasks={
            "embed_dim": 128,
            "itc_dop": 0.1,
            "lr_2": False,
            "max_tokens": 36,
            "erasing_p": 0.1,
            "batch_size_train": 32,
            "batch_size_test": 64,
            "batch_size_test_text": 256,
            "k_test": 32,
            "optimizer.lr": 1e-3,
            "optimizer.lr_mult": 2,
            "schedular.lr": 1e-3,
            "schedular.sched": "linear",
            "schedular.num_warmup_steps": 0.1,
        },
        tasks={
            "sda": {"schedular.epochs": 10},
            "cuhk": {"eda": False, "LabelSmooth": 0, "init_cross": True, "schedular.epochs": 17},
            "rstp": {"embed_dim": 256},
        },
    ),
}


def main(argv: list[str]) -> int:
    """Write the files; see `DESCRIPTION`.

    Raises:
        InputError: the lexicon cannot be used, or `--out` is no folder.
    """
    args = _parse(argv)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    vocabulary = make_vocabulary(read_lexicon(Path(args.lexicon)))
    write_tiny(out, PRESETS[args.preset], vocabulary, args.seed)
    print(f"written to {out}: configs/, data/bert-base-uncased/, data/checkpoint/, run.py; next: cd {out}")
    return 0


def make_vocabulary(lexicon: list[str]) -> list[str]:
    """Tokens for captions of the lexicon's words; any other lower-case ASCII word falls into letters, never [UNK]."""
    characters = string.ascii_lowercase + string.digits
    words = [part for line in lexicon for part in re.split("[^0-9a-z]+", line.lower()) if part]
    tokens = [
        *SPECIAL_TOKENS,
        *characters,
        *(f"##{character}" for character in characters),
        *string.punctuation,
        *words,
    ]
    return list(dict.fromkeys(tokens))


def write_tiny(out: Path, preset: Preset, vocabulary: list[str], seed: int) -> None:
    """Write the folder.

    Args:
        out: made if absent; files of these names are replaced.
        preset: sizes.
        vocabulary: tokens by id.
        seed: of all weights.
    """
    vision, text = network_sizes(preset, len(vocabulary))
    write_json(out / TEXT_CONFIG, text)
    for task, sizes in vision.items():
        write_json(out / _vision_path(sizes), sizes)
        _write_yaml(out / f"configs/{task}.yaml", task, sizes, preset)
    write_bert_settings(out / BERT, text, vocabulary)
    known = set(vocabulary)
    table = {word: synonyms for word, synonyms in SYNONYMS.items() if word in known}
    write_json(out / "data/synonyms.json", table)
    for name, call in (("run.py", "run_main"), ("Retrieval.py", "retrieval_main")):
        write_text(out / name, _SCRIPT.format(call=call))
    _write_weights(out, vision, text, seed)


def network_sizes(preset: Preset, words: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """`vision_config` of each task, and `text_config` for a vocabulary of so many words."""
    vision = {
        "sda": _vision_config("config_swinB_224x224.json", preset, preset.pretraining_size),
        **dict.fromkeys(TASKS[1:], _vision_config("config_swinB_384x256.json", preset, preset.finetuning_size)),
    }
    text = {**_read_shipped("config_bert.json"), **preset.text, "vocab_size": words}
    text["encoder_width"] = preset.vision["vision_width"]
    return vision, text


_SCRIPT = """\
import sys

from mra.cli import {call}

if __name__ == "__main__":
    sys.exit({call}())
"""


def _write_yaml(path: Path, task: str, vision: dict[str, Any], preset: Preset) -> None:
    """The released file with other values; its comments stay."""
    from ruamel.yaml import YAML

    editor = YAML()
    editor.width = 120
    config = editor.load((PACKAGE / "configs" / f"{task}.yaml").read_text(encoding="utf-8"))
    config["vision_config"], config["text_config"] = _vision_path(vision), TEXT_CONFIG
    config["h"], config["w"], config["image_res"] = vision["h"], vision["w"], vision["image_res"]
    if "window_size" in config:
        config["window_size"] = vision["window_size"]
    for name, value in {**preset.all_tasks, **preset.tasks.get(task, {})}.items():
        *groups, key = name.split(".")
        (config[groups[0]] if groups else config)[key] = value
    if config["eda"]:
        config["synonyms"] = "data/synonyms.json"
    stream = io.StringIO()
    editor.dump(config, stream)
    write_text(path, stream.getvalue())


def write_bert_settings(folder: Path, text: dict[str, Any], vocabulary: list[str]) -> None:
    """Write the other files of a BERT folder: vocabulary, tokenizer's settings, sizes."""
    write_text(folder / "vocab.txt", "".join(f"{token}\n" for token in vocabulary))
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "tokenizer_class": "BertTokenizer"})
    own = ("fusion_layer", "encoder_width")
    write_json(folder / "config.json", {key: value for key, value in text.items() if key not in own})


def _write_weights(out: Path, vision: dict[str, dict[str, Any]], text: dict[str, Any], seed: int) -> None:
    import torch

    from mra.model import Retrieval
    from tbps_common.run.checkpoint import save_checkpoint

    names = {"sda": "pretrain", "cuhk": "ft_cuhk", "icfg": "ft_icfg", "rstp": "ft_rstp"}
    states = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for task, sizes in vision.items():
            config = load_config(out / f"configs/{task}.yaml")
            # The paths in the file are relative to the folder, in which nobody is now.
            inline = {**config, "vision_config": sizes, "text_config": text}
            states[task] = Retrieval(inline, init_backbones=False).state_dict()
            save_checkpoint({"model": dict(states[task]), "config": config}, out / f"data/checkpoint/{names[task]}.pth")
        classifier = torch.randn(16, vision["sda"]["vision_width"]) * 0.02
    write_swin(out / SWIN, _without_prefix(states["sda"], "vision_encoder."), classifier)
    write_bert_weights(out / BERT, _without_prefix(states["sda"], "text_encoder."))


def write_swin(file: Path, state: Mapping[str, Any], classifier: Any) -> None:
    """Write an image encoder's weights in the layout of the published Swin file, with its classifier `[classes, width]`."""
    from tbps_common.run.checkpoint import save_checkpoint

    swin = {**state, "head.weight": classifier, "head.bias": classifier.new_zeros(len(classifier))}
    save_checkpoint({"model": swin}, file)


def write_bert_weights(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a text encoder's weights as in the published BERT: no cross-attention, and the tied decoder is left out."""
    from safetensors.torch import save_file

    bert = {
        name: tensor.clone()
        for name, tensor in state.items()
        if "crossattention" not in name and ".decoder." not in name and not name.endswith("position_ids")
    }
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(bert, temporary, metadata={"format": "pt"})


def _without_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _vision_config(shipped: str, preset: Preset, size: tuple[int, int, int]) -> dict[str, Any]:
    height, width, window = size
    changes = {"image_res": height, "h": height, "w": width, "window_size": window, **copy.deepcopy(preset.vision)}
    return {**_read_shipped(shipped), **changes}


def _vision_path(vision: dict[str, Any]) -> str:
    # Presets of one size for both stages differ in their dropout only.
    stage = "_pre" if vision["drop_rate"] and vision["h"] != vision["w"] else ""
    return f"configs/config_swin_tiny_{vision['h']}x{vision['w']}{stage}.json"


def _read_shipped(name: str) -> dict[str, Any]:
    import json

    return json.loads((PACKAGE / "configs" / name).read_text(encoding="utf-8"))


def read_lexicon(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"--lexicon {path} does not exist: tbps-synth writes one named lexicon.txt") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--lexicon {path} cannot be read ({error}): give a text file, one word per line") from error
    if not any(line.strip() for line in lines):
        raise InputError(f"--lexicon {path} is empty: give a text file, one word per line")
    return lines


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mra-make-tiny", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into, where the data are")
    parser.add_argument("--lexicon", required=True, metavar="FILE", help="words of the captions, one per line")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the random weights")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny", help="sizes")
    return parser.parse_args(argv)
