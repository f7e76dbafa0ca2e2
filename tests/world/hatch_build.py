"""Hatchling metadata hook: dependencies on sibling packages become direct references into this tree.

`tbps-common` is on no registry, and an unrelated package could appear there under that name. A plain requirement
would then install a stranger's code, so the name is only ever written together with the URI of the sibling folder.
"""

from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SiblingDependencies(MetadataHookInterface):
    """Fills `project.dependencies` from the hook's own table in pyproject.toml."""

    def update(self, metadata: dict) -> None:
        siblings: dict[str, str] = self.config["siblings"]
        metadata["dependencies"] = [
            f"{requirement} @ {self._uri(requirement, siblings[requirement])}"
            if requirement in siblings
            else requirement
            for requirement in self.config["dependencies"]
        ]

    def _uri(self, name: str, folder: str) -> str:
        path = (Path(self.root) / folder).resolve()
        if not (path / "pyproject.toml").is_file():
            raise FileNotFoundError(
                f"{name} is not at {path}: build this package from a checkout of the whole repository "
                f"(git clone, then pip install packages/<name>)"
            )
        return path.as_uri()
