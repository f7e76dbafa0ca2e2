"""Hatchling metadata hook of all packages: dependencies on sibling packages become direct references into this tree.

`tbps-common` is on no registry, and an unrelated package could appear there under that name. A plain requirement
would then install a stranger's code, so the name is only ever written together with the URI of the sibling folder.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SiblingDependencies(MetadataHookInterface):
    """Fills `project.dependencies` from the hook's own table in pyproject.toml.

    The table names `siblings` (distribution name -> folder, relative to the package) and `dependencies`, in which a
    sibling stands by its name and, if need be, its extras.
    """

    def update(self, metadata: dict) -> None:
        metadata["dependencies"] = [self._direct(requirement) for requirement in self.config["dependencies"]]

    def _direct(self, requirement: str) -> str:
        siblings: dict[str, str] = self.config["siblings"]
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        if name not in siblings:
            return requirement
        folder = (Path(self.root) / siblings[name]).resolve()
        if not (folder / "pyproject.toml").is_file():
            raise FileNotFoundError(
                f"{name} is not at {folder}: build this package from a checkout of the whole repository "
                f"(git clone, then pip install packages/<name>)"
            )
        return f"{requirement} @ {folder.as_uri()}"
