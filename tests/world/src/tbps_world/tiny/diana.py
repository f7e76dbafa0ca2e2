"""`diana-make-tiny`: small random backbones and a tokenizer, so that the paper's scripts run on a laptop."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, number, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DESCRIPTION = """\
Write backbones of random weights, small enough to train on a laptop:

  diana-make-tiny --out tiny
  export VISION_PRETRAINED=$PWD/tiny/swinv2-tiny LLAMA_PRETRAINED=$PWD/tiny/llama-tiny CONFIG_DIR=$PWD/tiny/configs
  bash shell/pretrain.sh --force_image_size 96 48 --num_query 4

The folder receives swinv2-tiny/ and llama-tiny/ (as save_pretrained of transformers writes them; the latter with a
byte-level BPE tokenizer in Llama-3's layout) and configs/config.json, the sizes of the model.
"""
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
MASK, RESERVED, PAD = "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"
SPECIALS = (BOS, EOS, MASK, RESERVED, PAD)
# Llama 3 cuts text here before it joins bytes to tokens.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# With the library's 0.02 such narrow towers give all pictures, and all dialogues, nearly the same feature at the start.
INITIALIZER_RANGE = 0.1
_BYTES = 256


def main(argv: list[str]) -> int:
    """Parse, write, say what was written."""
    parser = argparse.ArgumentParser(
        prog="diana-make-tiny", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into (created if missing)")
    parser.add_argument(
        "--lexicon", metavar="FILE", help="words the tokenizer learns from (default: those of the synthetic world)"
    )
    parser.add_argument(
        "--vocab_size", type=whole_number(_BYTES + len(SPECIALS)), default=600, help="most entries of the tokenizer"
    )
    parser.add_argument(
        "--image_size",
        type=whole_number(16),
        nargs=2,
        default=[96, 48],
        metavar=("H", "W"),
        help="image height and width in pixels",
    )
    swin = parser.add_argument_group("SwinV2")
    swin.add_argument("--patch_size", type=whole_number(1), default=4, help="side of a patch, in pixels")
    swin.add_argument("--embed_dim", type=whole_number(1), default=16, help="width of the first stage")
    swin.add_argument("--depths", type=whole_number(1), nargs="+", default=[1, 2, 1, 1], help="layers of every stage")
    swin.add_argument("--num_heads", type=whole_number(1), nargs="+", default=[2, 2, 4, 4], help="heads of every stage")
    swin.add_argument("--window_size", type=whole_number(1), default=4, help="side of a window, in patches")
    parser.add_argument(
        "--logit_scale", type=number(0, above=True), default=50.0, help="inverse temperature at the start"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the random weights")
    flags = parser.parse_args(argv)
    if len(flags.depths) != len(flags.num_heads):
        raise InputError(
            f"--depths names {len(flags.depths)} stages and --num_heads {len(flags.num_heads)}: give one number per stage"
        )
    for stage, heads in enumerate(flags.num_heads):
        if flags.embed_dim * 2**stage % heads:
            raise InputError(
                f"--num_heads: {heads} does not divide {flags.embed_dim * 2**stage}, the width of stage {stage + 1}"
            )
    words = read_lexicon(flags.lexicon)
    vision = {
        "embed_dim": flags.embed_dim,
        "depths": flags.depths,
        "num_heads": flags.num_heads,
        "window_size": flags.window_size,
        "patch_size": flags.patch_size,
        "image_size": flags.image_size,
    }
    vocabulary = write_tiny(Path(flags.out), words, flags.vocab_size, vision, flags.logit_scale, flags.seed)
    print(f"wrote {flags.out}: swinv2-tiny, llama-tiny ({vocabulary} tokens), configs/config.json")
    return 0


def read_lexicon(path: str | None) -> list[str]:
    """Lines of a file, or the words of the synthetic world.

    Raises:
        InputError: the file cannot be read, or is empty.
    """
    if path is None:
        from tbps_world.synth.lexicon import lexicon

        return lexicon()
    try:
        words = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--lexicon {path} cannot be read ({error}): give a text file, one word per line") from error
    words = [word.strip() for word in words if word.strip()]
    if not words:
        raise InputError(f"--lexicon {path} is empty: give a text file, one word per line")
    return words


def write_tiny(
    out: Path, words: list[str], vocab_size: int, vision: dict[str, Any], logit_scale: float, seed: int
) -> int:
    """Write the three folders.

    Args:
        out: folder that receives them.
        words: the tokenizer learns from.
        vocab_size: most entries of the tokenizer, special ones included.
        vision: sizes of SwinV2, in the names of its configuration.
        logit_scale: inverse temperature at the start.
        seed: of the random weights.

    Returns:
        Number of tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Swinv2Config, Swinv2Model
    from transformers.utils import logging

    from tbps_common.files import write_json

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer(words, vocab_size)
    vision = {
        **vision,
        "mlp_ratio": 4.0,
        "pretrained_window_sizes": [0] * len(vision["depths"]),
        "drop_path_rate": 0.0,
        "initializer_range": INITIALIZER_RANGE,
    }
    llama = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 2048,
        "initializer_range": INITIALIZER_RANGE,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
        "tie_word_embeddings": True,
    }
    sizes = {
        "architectures": ["DiaNAModel"],
        "embed_dim": 64,
        "logit_scale": logit_scale,
        "torch_dtype": "float32",
        "vision_config": {"model_type": "swinv2", **vision},
        "llama_config": {"model_type": "llama", **llama},
        "refiner_config": {"enable": False, "num_query": 4, "num_hidden_layers": 2, "sim_type": "avg"},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Swinv2Model(Swinv2Config(**vision)).save_pretrained(out / "swinv2-tiny")  # type: ignore[arg-type]
        LlamaForCausalLM(LlamaConfig(**llama)).save_pretrained(out / "llama-tiny")  # type: ignore[arg-type]
    tokenizer.save_pretrained(str(out / "llama-tiny"))
    write_json(out / "configs" / "config.json", sizes)
    return len(tokenizer)


def tiny_tokenizer(words: list[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer in Llama-3's layout: ordinary tokens first, then the special ones, no eos added.

    Args:
        words: it learns from, beside the constant texts of the dialogues.
        vocab_size: most entries, special ones included.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from diana.data import PROMPT_POOL, SYSTEM_PROMPT

    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # What stands in every dialogue is repeated, so that it is learnt first and takes few tokens.
    texts = [SYSTEM_PROMPT] * 10 + list(PROMPT_POOL) * 3 + ["\nASSISTANT:", "\nUSER:"] * 10
    texts += [f" {word}" for word in words]
    backend.train_from_iterator(texts, trainer)
    # After the training, so that ordinary tokens are 0 .. n - 1 as in Llama 3.
    backend.add_special_tokens(list(SPECIALS))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, model_input_names=["input_ids", "attention_mask"]
    )
