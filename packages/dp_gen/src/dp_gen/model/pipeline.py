"""The trained model as one folder, which diffusers' own `StableDiffusionPipeline` can load too.

output_dir/
  model_index.json  scheduler/  tokenizer/  text_encoder/  unet/  vae/     # diffusers' layout
  image_encoder/  controller/                                              # what diffusers does not know
  dp_gen_config.json                                                       # written last: the folder is complete
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from dp_gen import IMAGE_TOKEN, __version__
from dp_gen.model.captions import load_tokenizer
from dp_gen.model.diverse_person import DiversePersonModel
from dp_gen.model.parts import load_generation_scheduler, quiet_libraries
from dp_gen.model.weights import load_checkpoint, write_errors
from tbps_common.errors import InputError
from tbps_common.files import write_json

CONFIG_NAME = "dp_gen_config.json"
_PLACES = ("scheduler", "tokenizer", "text_encoder", "unet", "vae", "image_encoder", "controller", "model_index.json")


class DiversePersonPipeline:
    """A model with its tokenizer and its generation scheduler.

    Attributes:
        model: in evaluation mode, float32 unless said otherwise.
        tokenizer: with the image token.
        scheduler: diffusers' scheduler that the Stable Diffusion model names.
        settings: content of `dp_gen_config.json` (resolution, max_reference_attribute_num, reference_attribute_types,
            loc_layers, args, version, ...).
    """

    def __init__(
        self, model: DiversePersonModel, tokenizer: CLIPTokenizer, scheduler: Any, settings: dict[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.scheduler, self.settings = model, tokenizer, scheduler, settings

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Any:
        """Load a folder that `save_pretrained` wrote.

        Raises:
            InputError: the folder is absent, incomplete or damaged.
        """
        root = Path(folder)
        if not (root / CONFIG_NAME).is_file():
            raise InputError(
                f"{root} has no {CONFIG_NAME}, so it is not the complete result of a training: name the --output_dir of "
                "a finished run"
            )
        missing = [place for place in _PLACES if not (root / place).exists()]
        if missing:
            raise InputError(
                f"{root} is missing {', '.join(missing)}: copy the trained model again, or give another one"
            )
        settings = _read_settings(root / CONFIG_NAME)
        try:
            args = argparse.Namespace(**settings["args"])
            args.MAX_REFERENCE_ATTRIBUTE_NUM = int(settings["max_reference_attribute_num"])
            args.resolution = int(settings["resolution"])
            args.loc_layers = int(settings["loc_layers"])
            args.attribute_loc = bool(args.attribute_loc)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{root / CONFIG_NAME} is missing a setting ({error}): copy it from the training again"
            ) from error
        args.pretrained_model_hf, args.image_encoder_hf = str(root), str(root / "image_encoder")
        args.revision = args.variant = args.load_model = None
        return cls._build(args, settings, str(root), dtype)

    @classmethod
    def from_args(cls, args: argparse.Namespace, *, dtype: torch.dtype = torch.float32) -> Any:
        """The model that the flags of generation name.

        `--finetuned_model_path` may be a final folder, which holds everything, or a checkpoint folder or file, whose
        weights then go into the parts of `--pretrained_model_hf` and `--image_encoder_hf`.

        Raises:
            InputError: a part cannot be found, read or used.
        """
        trained = args.finetuned_model_path
        if trained and (Path(trained) / CONFIG_NAME).is_file():
            return cls.from_pretrained(trained, dtype=dtype)
        return cls._build(args, settings_of(args), trained, dtype)

    @classmethod
    def _build(cls, args: argparse.Namespace, settings: dict[str, Any], trained: str | None, dtype: torch.dtype) -> Any:
        model = DiversePersonModel.from_pretrained(args)
        if trained:
            load_checkpoint(model, trained)
        tokenizer = load_tokenizer(args.pretrained_model_hf, args.revision, cache_dir=args.cache_dir)
        model.requires_grad_(False)
        return cls(model.eval().to(dtype), tokenizer, load_generation_scheduler(args), settings)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder; the parts are float32. An earlier result stays until the new one is complete.

        Raises:
            OSError: the folder cannot be written.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        partial = root / ".pipeline.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with write_errors(root), quiet_libraries():
                self._write_parts(partial)
            (root / CONFIG_NAME).unlink(missing_ok=True)
            for place in _PLACES:
                if (root / place).is_dir():
                    shutil.rmtree(root / place)
                os.replace(partial / place, root / place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        write_json(root / CONFIG_NAME, self.settings)

    def _write_parts(self, folder: Path) -> None:
        model = self.model.float()
        StableDiffusionPipeline(
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=self.tokenizer,
            unet=model.unet,
            scheduler=self.scheduler,
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        ).save_pretrained(folder)
        model.image_encoder.save_pretrained(folder / "image_encoder")
        (folder / "controller").mkdir()
        controller = {name: tensor.contiguous() for name, tensor in model.controller.state_dict().items()}
        save_file(controller, folder / "controller" / "model.safetensors")
        write_json(folder / "controller" / "config.json", {"embedding_dim": model.text_encoder.config.hidden_size})


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Content of `dp_gen_config.json` for the flags of a training."""
    return {
        "resolution": args.resolution,
        "max_reference_attribute_num": args.MAX_REFERENCE_ATTRIBUTE_NUM,
        "image_token": IMAGE_TOKEN,
        "reference_attribute_types": args.reference_attribute_types,
        "loc_layers": args.loc_layers,
        "args": dict(sorted(vars(args).items())),
        "version": __version__,
    }


def _read_settings(path: Path) -> dict[str, Any]:
    """`dp_gen_config.json` of a final folder.

    Raises:
        InputError: it cannot be read.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): it belongs to a folder that train.py wrote") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no settings: it belongs to a folder that train.py wrote")
    return settings
