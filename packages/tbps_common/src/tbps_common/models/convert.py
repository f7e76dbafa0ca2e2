"""`tbps-model convert FILE --to hub | official --out OUT`: a checkpoint in another layout, its weights copied bit by bit."""

import argparse
from importlib import import_module
from pathlib import Path

from tbps_common.errors import CheckpointError, InputError
from tbps_common.models.contents import read_contents
from tbps_common.models.hub import Checkpoint, write_hub_folder, write_weights
from tbps_common.models.inspect import inspect
from tbps_common.models.layouts import Paper, known_papers
from tbps_common.models.source import is_hub_folder
from tbps_common.run.checkpoint import find_state_dict, load_checkpoint_file, save_checkpoint


def main(flags: argparse.Namespace) -> int:
    """Convert one checkpoint.

    Raises:
        InputError: it is not one of a paper that has the layout of the hub, does not fit its model, or needs a flag.
    """
    source, out = Path(flags.file), Path(flags.out)
    is_hub = is_hub_folder(source)
    if is_hub == (flags.to == "hub"):
        raise InputError(f"{source} is {'already' if is_hub else 'not'} in the layout of the hub: nothing to convert")
    if (out.is_dir() and flags.to == "official") or (out.is_file() and flags.to == "hub"):
        raise InputError(f"--out {out} is a {'folder' if out.is_dir() else 'file'}: give another name")
    if flags.to == "official" and out.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        raise InputError(f"--out {out} must end in .pth, .pt, .bin (torch) or .safetensors")
    paper = _require_convertible(source)
    state, beside = find_state_dict(
        load_checkpoint_file(source, trust=flags.trust_checkpoint, mmap=True), source=str(source)
    )
    module = import_module(paper.convert)
    if flags.to == "hub":
        write_hub_folder(out, module.to_hub(Checkpoint(source, state, beside, flags.config, flags.tokenizer)))
    elif out.suffix == ".safetensors":
        write_weights(out, state)
    else:
        save_checkpoint({"model": state, **module.beside_official(beside["config"])}, out)
    print(f"{len(state)} tensors of {paper.name} written to {out}")
    return 0


def _require_convertible(source: Path) -> Paper:
    """The paper whose checkpoint a file is.

    Raises:
        CheckpointError: it is none, or does not fit its model.
    """
    found = inspect(read_contents(source))
    papers = {paper.name: paper for paper in known_papers() if paper.convert}
    paper = papers.get(found["paper"])
    if paper is None or not found["layout"].startswith(paper.layouts[0].name):
        what = found["layout"] or "a file of no known layout"
        raise CheckpointError(f"{source} is not a checkpoint of {', '.join(papers)} but {what}: it cannot be converted")
    if not found["fits"]:
        wrong = next(
            (found[key] for key in ("missing", "unexpected", "misshapen") if found[key]), [found.get("not_compared")]
        )
        raise CheckpointError(f"{source} does not fit the model ({wrong[0]}): tbps-model inspect {source} says more")
    return paper
