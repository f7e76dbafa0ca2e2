"""`fafa-index`, `fafa-search`, and the retriever `fafa:RUN` of `tbps-index` and the others.

A query is the picture of a person and a sentence that says what is different in the pictures to find.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fafa.processors import BlipCaptionProcessor
from fafa.run_directory import BEST_BY_EPOCH, BEST_BY_STEP, LAST, WEIGHTS, TrainedRun, read_run
from fafa.trained import TrainedModel, open_trained
from tbps_common.errors import CheckpointError, InputError
from tbps_common.images import read_image
from tbps_common.models.source import find_model
from tbps_common.search.commands import run_index, run_search
from tbps_common.search.retriever import Feature, Features, Query, Retriever


def index(run: TrainedRun, flags: argparse.Namespace) -> int:
    """Bring a gallery up to date with a folder's pictures."""
    return run_index(flags, partial(_retriever, run, flags), batch_size=flags.batch_size, num_workers=flags.num_workers)


def search(run: TrainedRun, flags: argparse.Namespace) -> int:
    """Rank the pictures of a gallery for one picture and sentence, print them, and draw them."""
    if not flags.text.strip():
        raise InputError("--text is empty: say what should be different in the images to find")
    image = read_image(flags.image, as_shown=True)
    return run_search(flags, partial(_retriever, run, flags), Query(flags.text, image))


def _retriever(run: TrainedRun, flags: argparse.Namespace) -> Retriever:
    return fafa_retriever(open_trained(run, flags.device, trust=flags.trust_checkpoint), f"fafa:{run.directory}")


def open_fafa(place: str, *, device: str = "auto", trust: bool = False) -> Retriever:
    """The model of a run directory (the best one by step, by epoch, or the last), of a file of its saved_models/, or in the
    layout of the hub.

    Raises:
        InputError: a file is missing or damaged.
    """
    path = Path(find_model(place, "--model fafa:"))
    if not path.exists():
        raise CheckpointError(
            f"--model fafa:{place}: there is no such run directory; name the folder that the training wrote"
        )
    if path.is_dir():
        folder, names = path, [f"{stem}.pt" for stem in (BEST_BY_STEP, BEST_BY_EPOCH, LAST)]
        name = next((name for name in names if (folder / WEIGHTS / name).is_file()), names[0])
    else:
        folder, name = path.parent.parent, path.name
    run = read_run(argparse.Namespace(exp_dir=str(folder), model_name=name, backbone=None))
    return fafa_retriever(open_trained(run, device, trust=trust), f"fafa:{place}")


def fafa_retriever(trained: TrainedModel, name: str) -> Retriever:
    """A trained model as a retriever: the mean of the picture's k token features that fit the query best."""
    model, clean = trained.model, BlipCaptionProcessor()

    def encode_images(pictures: Tensor) -> Features:
        return {"tokens": model.target_features(model.evaluation_states(pictures)).float()}

    def encode_queries(queries: Sequence[Query]) -> Features:
        pictures = torch.stack([trained.transforms.test(query.image) for query in queries if query.image is not None])
        states = model.evaluation_states(pictures.to(model.device))
        return {"tokens": model.query_features(states, [clean(query.text) for query in queries]).float()}

    shape = (model.settings.num_query_token, model.settings.embed_dim)
    return Retriever(
        name=name,
        queries=("image+text",),
        fingerprint=trained.fingerprint,
        features=(Feature("tokens", shape, reduce="topk_mean", k=model.fda_k),),
        device=model.device,
        transform=trained.transforms.test,
        encode_images=encode_images,
        encode_queries=encode_queries,
    )
