"""`tbps-model inspect FILE`: what a weight file is, and whether it fits this project's model of that kind."""

import argparse
import hashlib
import math
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tbps_common.files import write_json
from tbps_common.models.contents import Contents, read_contents
from tbps_common.models.layouts import Description, known_papers, match

_SHOWN = 5


def main(flags: argparse.Namespace) -> int:
    """Print what is found; returns the exit status, see the parser.

    Raises:
        InputError: the file cannot be read.
    """
    contents = read_contents(flags.file)
    found = inspect(contents)
    if not flags.no_checksum:
        found["sha256"] = {file.name: _checksum(file) for file in contents.files}
    print(_as_text(found))
    if flags.names:
        for name, tensor in contents.state.items():
            print(f"  {_printable(name)} {_shape(tensor)}")
    if flags.json:
        write_json(flags.json, found | {"tensors": {name: _shape(tensor) for name, tensor in contents.state.items()}})
    return int(found["layout"] is None or found["fits"] is False)


def inspect(contents: Contents) -> dict[str, Any]:
    """All that can be said about the contents of a file.

    Returns:
        `file`, `form`, `paper`, `layout` (None: unknown), `nearest` (layout and share of its marks, of an unknown one), `tensors`
        and `parameters` (numbers), `bytes`, `dtypes`, `beside`, `sizes`, `fits` (None: not compared), `missing`, `unexpected`,
        `misshapen`.
    """
    paper, layout, share = match(contents.state, known_papers())
    known = share == 1
    sizes = [tensor.numel() for tensor in contents.state.values()]
    dtypes: dict[str, int] = {}
    for tensor in contents.state.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + 1
    found: dict[str, Any] = {
        "file": os.fspath(contents.path),
        "form": contents.form,
        "paper": paper.name if known else None,
        "layout": layout.name if known else None,
        "nearest": None if known or not share else {"paper": paper.name, "layout": layout.name, "share": share},
        "tensors": len(sizes),
        "parameters": sum(sizes),
        "bytes": sum(file.stat().st_size for file in contents.files),
        "dtypes": dtypes,
        "beside": {name: _plain(value) for name, value in contents.beside.items()},
        "sizes": {},
        "fits": None,
        "missing": [],
        "unexpected": [],
        "misshapen": [],
    }
    if known and (contents.config or {}).get("model_type") == paper.name.lower():
        found["layout"] = f"{layout.name}, in the layout of the hub"
    if not known or not layout.describe:
        return found
    try:
        description = pkgutil.resolve_name(layout.describe)(contents)
    except Exception as error:
        # Sizes that belong to no model can make the libraries fail with nearly any exception; then the shapes are all that
        # can be said.
        found["not_compared"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return found | {"fits": False}
    return found | {"sizes": dict(description.sizes), **_compared(description)}


def _compared(description: Description) -> dict[str, Any]:
    own, given, optional = description.expected, description.found, description.optional
    missing = [name for name in own if name not in given and not optional(name)]
    unexpected = [name for name in given if name not in own and not optional(name)]
    misshapen = [
        f"{name} {_shape(given[name])} instead of {_shape(own[name])}"
        for name in own
        if name in given and given[name].shape != own[name].shape and not optional(name)
    ]
    return {
        "fits": not (missing or unexpected or misshapen),
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
    }


def _plain(value: Any) -> Any:
    """A value for people: numbers and short texts as they are, of everything else the kind and the size."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str):
        return value if len(value) <= 80 else f"{value[:77]}..."
    if isinstance(value, Tensor):
        return f"tensor {_shape(value)}"
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}] {str(tensor.dtype).removeprefix('torch.')}"


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_text(found: Mapping[str, Any]) -> str:
    lines = [f"{found['file']}: {found['form']}, {found['bytes']:,} bytes"]
    nearest = found["nearest"]
    if found["layout"] is None and nearest is None:
        lines.append("layout:      unknown, and near to none that is known")
    elif nearest is not None:
        lines.append(
            f"layout:      unknown; nearest is {nearest['layout']} ({nearest['paper']}), of whose characteristic tensors "
            f"{nearest['share']:.0%} are there"
        )
    else:
        lines += [f"paper:       {found['paper']}", f"layout:      {found['layout']}"]
    dtypes = ", ".join(f"{count} {name}" for name, count in found["dtypes"].items())
    lines.append(f"tensors:     {found['tensors']:,} ({dtypes}), {found['parameters']:,} numbers")
    lines += [f"{name + ':':<12} {value}" for name, value in found["sizes"].items()]
    lines += [f"beside them: {name} = {value}" for name, value in found["beside"].items()]
    if found.get("not_compared"):
        lines.append(f"compared:    no: {found['not_compared']}")
    elif found["fits"] is not None:
        lines.append(
            f"compared:    {'fits the model of these sizes' if found['fits'] else 'does not fit the model of these sizes'}"
        )
    lines += [_listed(what, found[what]) for what in ("missing", "unexpected", "misshapen") if found[what]]
    lines += [f"sha256:      {digest}  {name}" for name, digest in found.get("sha256", {}).items()]
    return "\n".join(lines)


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what + ':':<12} {len(names)}: {', '.join(map(_printable, names[:_SHOWN]))}{more}"


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
