"""Tiny random models in the paper's own layout, so that every command runs without a download and without a GPU."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_gen.constants import BASE_MODEL, IMAGE_ENCODER
from tbps_common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

TEXT_WIDTH = 32
LENGTH = 77
UNET_WIDTH = 8
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def byte_symbols() -> list[str]:
    """CLIP's 256 printable characters for bytes, in the order of its vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Greedy byte-pair merges until every word is one token: the most frequent pair first, ties alphabetically."""
    spellings = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    merges = []
    while True:
        pairs = Counter(pair for spelling in spellings for pair in zip(spelling, spelling[1:]))
        if not pairs:
            return merges
        most = max(pairs.values())
        left, right = min(pair for pair, count in pairs.items() if count == most)
        merges.append((left, right))
        spellings = [_merged(spelling, left, right) for spelling in spellings]


def _merged(spelling: list[str], left: str, right: str) -> list[str]:
    result: list[str] = []
    place = 0
    while place < len(spelling):
        if spelling[place : place + 2] == [left, right]:
            result.append(left + right)
            place += 2
        else:
            result.append(spelling[place])
            place += 1
    return result


def read_lexicon(path: str | None) -> list[str]:
    """Words of a file, or those of the synthetic world.

    Raises:
        InputError: the file cannot be read or holds no words.
    """
    if path is None:
        from tbps_world.synth.lexicon import lexicon

        return lexicon()
    try:
        words = sorted({word.lower() for word in Path(path).read_text(encoding="utf-8").split()})
    except (OSError, ValueError) as error:
        raise InputError(f"--lexicon {path} cannot be read as text ({error}): name a file of words") from error
    words = sorted({part for word in words for part in _byte_pair_words(word)})
    if not words:
        raise InputError(f"--lexicon {path} holds no words: write one per line")
    return words


def _byte_pair_words(word: str) -> list[str]:
    import re

    return re.findall(r"[a-z]+", word)


def write_tiny_models(
    out: str | Path,
    words: Sequence[str] | None = None,
    seed: int = 0,
    *,
    unet_width: int = UNET_WIDTH,
    vae_images: "Tensor | None" = None,
    vae_updates: int = 0,
) -> tuple[Path, Path]:
    """Write a Stable Diffusion and a CLIP, about 1.3 MB together, under the names of the paper's command.

    Args:
        out: folder; receives `runwayml/stable-diffusion-v1-5` and `openai/clip-vit-large-patch14`.
        words: of the tokenizer, each one token; None takes those of the synthetic world.
        seed: of the random weights.
        unet_width: channels of the U-Net's first stage; the others have twice as many.
        vae_images: [n, 3, R, R] in [-1, 1], on which the VAE is trained; None leaves it random.
        vae_updates: of that training.

    Returns:
        The two folders.
    """
    import torch

    sd, clip = Path(out) / BASE_MODEL, Path(out) / IMAGE_ENCODER
    vocabulary = _write_tokenizer(sd / "tokenizer", list(words) if words is not None else read_lexicon(None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_stable_diffusion(sd, vocabulary, unet_width, vae_images, vae_updates)
        _write_clip(clip)
    return sd, clip


def _write_tokenizer(folder: Path, words: list[str]) -> dict[str, int]:
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(part for word in words for part in _byte_pair_words(word.lower()))
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *(a + b for a, b in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return vocabulary


def _write_stable_diffusion(
    folder: Path, vocabulary: dict[str, int], unet_width: int, vae_images: "Tensor | None", vae_updates: int
) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from dp_gen.model.parts import quiet_libraries

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocabulary[START],
            eos_token_id=vocabulary[END],
            pad_token_id=vocabulary[END],
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(unet_width, *(2 * unet_width,) * 3),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae_settings: dict[str, Any] = dict(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
    )
    vae = AutoencoderKL(**vae_settings)
    if vae_images is not None:
        from tbps_world.tiny.dp_gen_vae import train_vae

        error = train_vae(vae, vae_images, vae_updates, show=True)
        print(f"the VAE's mean squared error on {len(vae_images)} training images: {error:.4f} (pixels from -1 to 1)")
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    with quiet_libraries():
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            unet=unet,
            scheduler=scheduler,  # type: ignore[arg-type]
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        ).save_pretrained(folder)


def _write_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from dp_gen.model.parts import quiet_libraries

    config = CLIPConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=TEXT_WIDTH,
        ).to_dict(),
        text_config=CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=0,
            eos_token_id=2,
        ).to_dict(),
        projection_dim=TEXT_WIDTH,
    )
    with quiet_libraries():
        CLIPModel(config).save_pretrained(folder)
