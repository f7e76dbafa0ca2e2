"""`cmlfa-index`, `cmlfa-search`, and what they share with `tbps-index`: the retrievers `cmlfa:RUN` and `clip:MODEL/WEIGHTS`."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip import CLIP
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from cmlfa.config import CONFIG_NAME
from cmlfa.datasets import build_transforms, tokenize
from cmlfa.model.clip import build_clip, clip_geometry, load_start_weights
from cmlfa.model.start_weights import read_clip_file
from cmlfa.model.tokenizer import shared_tokenizer
from cmlfa.options import Options
from cmlfa.run_directory import read_run
from cmlfa.trained import TrainedModel, open_trained
from tbps_common.errors import CheckpointError, InputError
from tbps_common.models.source import find_model, is_hub_folder
from tbps_common.run.checkpoint import fingerprint, load_state_dict_strictly
from tbps_common.run.device import choose_device
from tbps_common.search.commands import run_index, run_search
from tbps_common.search.retriever import Feature, Features, Query, Retriever

_BATCH_NOTE = (
    "trained with --lfa_attention batch, so a feature depends on the batch it is computed in: pictures are encoded in "
    "batches, sentences alone"
)


def index(flags: argparse.Namespace, options: Options) -> int:
    """Bring a gallery up to date with a folder's pictures."""
    return run_index(
        flags,
        lambda: cmlfa_retriever(open_trained(flags, options), f"cmlfa:{Path(flags.config_file).parent}"),
        batch_size=options.test_batch_size,
        num_workers=options.num_workers,
    )


def search(flags: argparse.Namespace, options: Options) -> int:
    """Rank the pictures of a gallery for one sentence, print them, and draw them."""
    name = f"cmlfa:{Path(flags.config_file).parent}"
    return run_search(flags, lambda: cmlfa_retriever(open_trained(flags, options), name), Query(flags.text))


def open_cmlfa(place: str, *, device: str = "auto", trust: bool = False) -> Retriever:
    """The model of a run directory, of its configs.yaml, of one of its checkpoints, or in the layout of the hub.

    Raises:
        InputError: a file is missing or damaged.
    """
    path = Path(find_model(place, "--model cmlfa:"))
    if not path.exists():
        raise CheckpointError(
            f"--model cmlfa:{place}: there is no such run directory; name the folder that cmlfa-train wrote"
        )
    config = None if is_hub_folder(path) else str((path if path.is_dir() else path.parent) / CONFIG_NAME)
    checkpoint = None if config and (path.is_dir() or path.name == CONFIG_NAME) else str(path)
    flags = argparse.Namespace(config_file=config, checkpoint=checkpoint, device=device, trust_checkpoint=trust)
    return cmlfa_retriever(open_trained(flags, read_run(flags)), f"cmlfa:{place}")


def cmlfa_retriever(trained: TrainedModel, name: str) -> Retriever:
    """A trained model as a retriever: the cosine of a sentence and a picture."""
    options, model = trained.options, trained.model

    def encode_images(pictures: Tensor) -> Features:
        return {"feature": normalize(model.encode_image(pictures), dim=1).float()}

    def encode_text(sentence: str) -> Tensor:
        ids = tokenize(sentence, shared_tokenizer(), options.text_length)
        return normalize(model.encode_text(ids[None].to(trained.device)), dim=1).float()

    return Retriever(
        name=name,
        queries=("text", "image"),
        fingerprint=trained.fingerprint,
        features=(Feature("feature", (cast(Tensor, model.base_model.text_projection).shape[1],)),),
        device=trained.device,
        transform=build_transforms(options.img_size, aug=False, is_train=False),
        encode_images=encode_images,
        # One at a time: with --lfa_attention batch the features of a batch depend on each other.
        encode_queries=_encoder(
            lambda texts: torch.cat([encode_text(text) for text in texts]),
            lambda pictures: encode_images(pictures)["feature"],
            build_transforms(options.img_size, aug=False, is_train=False),
            trained.device,
        ),
        batch_size=options.test_batch_size,
        note=_BATCH_NOTE if options.lfa_attention == "batch" else "",
    )


def open_clip_model(place: str, *, device: str = "auto", trust: bool = False) -> Retriever:
    """A CLIP model without training on persons.

    A picture is squashed to the model's square rather than cropped, which would cut off heads and feet.

    Args:
        place: `MODEL/WEIGHTS` of open_clip, such as `ViT-B-16/openai`, where WEIGHTS may be a file; `hf-hub:ORG/NAME`; or a
            file of CLIP weights in OpenAI's layout.
        device: of `--device`.
        trust: unused: weights are never read in a way that could run code.

    Raises:
        InputError: no such model or weights.
    """
    if os.path.isfile(place):
        model, transform, tokenizer = _of_file(Path(place))
    else:
        model, transform, tokenizer = _of_open_clip(place)
    where = choose_device(device)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("logit_scale")}
    mark = fingerprint(state, {"transform": str(transform)})
    model = model.to(where).eval()

    def encode_images(pictures: Tensor) -> Features:
        return {"feature": model.encode_image(pictures, normalize=True).float()}

    with torch.inference_mode():
        width = model.encode_text(tokenizer(["person"]).to(where)).shape[1]
    return Retriever(
        name=f"clip:{place}",
        queries=("text", "image", "image+text"),
        fingerprint=mark,
        features=(Feature("feature", (width,)),),
        device=where,
        transform=transform,
        encode_images=encode_images,
        encode_queries=_encoder(
            lambda texts: model.encode_text(tokenizer(list(texts)).to(where), normalize=True).float(),
            lambda pictures: encode_images(pictures)["feature"],
            transform,
            where,
        ),
    )


def _encoder(
    encode_texts: Callable[[Sequence[str]], Tensor],
    encode_images: Callable[[Tensor], Tensor],
    transform: Callable[[Image.Image], Tensor],
    device: torch.device,
) -> Callable[[Sequence[Query]], Features]:
    """Queries of both kinds, and of a picture and a sentence together the normalised sum of their features."""

    def encode(queries: Sequence[Query]) -> Features:
        parts = []
        texts = [query.text for query in queries]
        if queries[0].kind != "image":
            parts.append(encode_texts(texts))
        if queries[0].kind != "text":
            pictures = [transform(query.image) for query in queries if query.image is not None]
            parts.append(encode_images(torch.stack(pictures).to(device)))
        return {"feature": parts[0] if len(parts) == 1 else normalize(parts[0] + parts[1], dim=1)}

    return encode


def _of_open_clip(place: str) -> tuple[Any, Any, Any]:
    name, _, weights = (place, "", "") if place.startswith("hf-hub:") else place.partition("/")
    if not name.startswith("hf-hub:"):
        if name not in open_clip.list_models():
            raise InputError(
                f"--model clip:{place}: open_clip has no model {name!r}; it has {', '.join(_close(name))}, ..."
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if weights not in tags and not os.path.isfile(weights):
            raise CheckpointError(
                f"--model clip:{place}: {weights!r} is neither a file nor among open_clip's weights of {name}: "
                f"{', '.join(tags) or 'none'}"
            )
    local = os.path.isfile(weights)
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, None if local else weights or None, load_weights=not local, image_resize_mode="squash"
        )
    except Exception as error:  # a download that fails has many names
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"--model clip:{place} cannot be loaded: {reason}") from error
    if local:
        load_state_dict_strictly(model, read_clip_file(Path(weights)), source=weights)
    return model, transform, open_clip.get_tokenizer(name)


def _close(name: str) -> list[str]:
    names = open_clip.list_models()
    return [one for one in names if one.lower().startswith(name.lower()[:5])][:5] or names[:5]


def _of_file(file: Path) -> tuple[Any, Any, Any]:
    state = read_clip_file(file)
    geometry = clip_geometry(state, str(file))
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5) * geometry.patch_size
    model: CLIP = build_clip(geometry, (side, side), geometry.patch_size)
    load_start_weights(model, state, geometry.grid((side, side), geometry.patch_size), str(file))
    transform = open_clip.image_transform(side, is_train=False, resize_mode="squash")
    return model, transform, open_clip.SimpleTokenizer(context_length=geometry.context_length)
