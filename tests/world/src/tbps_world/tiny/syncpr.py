"""`fafa-syncpr-make-tiny`: tiny models of random weights in the layout of the real ones, to try the stages without downloads."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, whole_number

DESCRIPTION = """\
Write tiny models of random weights:

  OUT/sd     a Stable Diffusion   (fafa-syncpr images --model OUT/sd, fafa-syncpr lora --model OUT/sd)
  OUT/flux   a Flux               (the same)
  OUT/clip   a CLIP               (fafa-syncpr filter --clip OUT/clip)

What they make and measure means nothing; it shows that the commands run. With --learn ROOT (a folder of small drawings with
captions in SynCPR's layout, such as tbps-synth writes) sd and clip are trained on them for some minutes, for 64 x 64 pictures.
"""

START, END = "<|startoftext|>", "<|endoftext|>"
WIDTH = 32
LENGTH = 77
_KINDS = ("sd", "flux", "clip")


def main(argv: list[str]) -> int:
    """Write the models; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fafa-syncpr-make-tiny", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, help="folder that receives the models")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS), help="which models to write")
    parser.add_argument("--words", metavar="FILE", help="words of the tokenizers; None: those of tbps-synth")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the random weights")
    parser.add_argument("--learn", metavar="ROOT", help="train sd and clip on this folder's pictures and captions")
    parser.add_argument("--updates", type=whole_number(1), default=800, help="updates of the training, with --learn")
    flags = parser.parse_args(argv)
    from tbps_common.pipeline.models import require_libraries

    require_libraries("fafa-syncpr-make-tiny", "packages/fafa[syncpr]", "diffusers", "transformers")
    words = words_of(flags.words)
    if flags.learn:
        from tbps_world.tiny.syncpr_training import write_taught_models

        folders = write_taught_models(flags.out, flags.learn, words, flags.updates, flags.seed)
    else:
        folders = write_tiny_models(flags.out, words, kinds=flags.kinds, seed=flags.seed)
    for folder in folders:
        print(f"written: {folder}")
    return 0


def words_of(path: str | None) -> list[str]:
    """The words of a text file, or those of the synthetic world.

    Raises:
        InputError: the file cannot be read or holds none.
    """
    if path is None:
        from tbps_world.synth.lexicon import lexicon

        return lexicon()
    try:
        words = sorted(set(Path(path).read_text(encoding="utf-8").lower().split()))
    except (OSError, ValueError) as error:
        raise InputError(f"--words {path} cannot be read as text: name a file of words") from error
    if not words:
        raise InputError(f"--words {path} holds no words: write one per line")
    return words


def write_tiny_models(
    out: str | Path, words: Sequence[str], *, kinds: Sequence[str] = _KINDS, seed: int = 0
) -> list[Path]:
    """Write the models, each a few hundred kilobytes.

    Args:
        out: folder that receives `sd`, `flux` and `clip`.
        words: each becomes one token.
        kinds: which of the three.
        seed: of the weights.

    Returns:
        Their folders.
    """
    import torch

    from tbps_common.pipeline.models import quiet_libraries

    writers = {"sd": _write_sd, "flux": _write_flux, "clip": _write_clip}
    folders = []
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        for kind in kinds:
            torch.manual_seed(seed)
            writers[kind](Path(out) / kind, words)
            folders.append(Path(out) / kind)
    return folders


def clip_tokenizer(words: Sequence[str], length: int = LENGTH) -> Any:
    """A CLIP tokenizer whose merges make every word one token; other words fall into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=50_000, min_frequency=0, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    parts = sorted({part for word in words for part in word.lower().replace("-", " ").split()})
    trained.train_from_iterator(parts, trainer)
    content = json.loads(trained.to_str())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in content["merges"]]
    tokens = list(dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *content["vocab"], START, END]))
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)  # type: ignore[arg-type]


def text_encoder(tokenizer: Any, *, width: int = WIDTH, layers: int = 2) -> Any:
    """A tiny CLIP text encoder for that tokenizer."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_text_settings(tokenizer, width, layers))


def _text_settings(tokenizer: Any, width: int, layers: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(latents: int, widths: tuple[int, ...] = (8, 16), **more: Any) -> Any:
    from diffusers import AutoencoderKL

    # A dict, because the library declares tuples of one width.
    settings: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": latents,
        "sample_size": 64,
    }
    return AutoencoderKL(**settings, **more)


def stable_diffusion(
    words: Sequence[str],
    *,
    widths: tuple[int, ...] = (8, 16),
    vae_widths: tuple[int, ...] = (8, 16),
    text_width: int = WIDTH,
    text_layers: int = 2,
    length: int = LENGTH,
) -> Any:
    """A Stable Diffusion pipeline of random weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(words, length)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=text_width,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    return StableDiffusionPipeline(
        vae=_vae(4, vae_widths),
        text_encoder=text_encoder(tokenizer, width=text_width, layers=text_layers),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def _write_sd(folder: Path, words: Sequence[str]) -> None:
    stable_diffusion(words).save_pretrained(folder)


def _write_flux(folder: Path, words: Sequence[str]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer, long_tokenizer = clip_tokenizer(words), clip_tokenizer(words, 512)
    reader = T5EncoderModel(
        T5Config(
            vocab_size=len(long_tokenizer), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=1, num_heads=4,
        )
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    FluxPipeline(
        vae=_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=reader,
        tokenizer_2=long_tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)


def clip_model(words: Sequence[str], *, image_size: int = 32, patch_size: int = 8, width: int = WIDTH) -> Any:
    """A CLIP of random weights and its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    tokenizer = clip_tokenizer(words)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=width,
    )
    settings = CLIPConfig(
        vision_config=vision.to_dict(), text_config=_text_settings(tokenizer, width, 2).to_dict(), projection_dim=width
    )
    sizes = {"height": image_size, "width": image_size}
    return CLIPModel(settings), tokenizer, CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=sizes)


def _write_clip(folder: Path, words: Sequence[str]) -> None:
    for part in clip_model(words):
        part.save_pretrained(folder)
