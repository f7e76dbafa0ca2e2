"""What the quadruples are about: attribute combinations, drawn from seed lists and reproducible one by one."""

import hashlib
import json
import random
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from tbps_common.datasets import read_json
from tbps_common.errors import DatasetError

MOST_CHANGES = 3
_FORM = '{"person": {NAME: [TEXT, ...]}, "picture": {NAME: [TEXT, ...]}, "changes": [NAME, ...]}'


@dataclass(frozen=True)
class SeedLists:
    """Values to draw from.

    Attributes:
        person: name -> values; the same in both pictures.
        picture: name -> values; drawn for the first picture, and again for what changes in the second.
        changes: names of `picture` that may change.
        fingerprint: of all of them.
    """

    person: dict[str, list[str]]
    picture: dict[str, list[str]]
    changes: list[str]
    fingerprint: str

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """The combination for quadruple `number`: `person`, `picture_1`, and the values that `picture_2` changes.

        It depends on the lists, the seed and the number alone, not on what was drawn before.
        """
        choose = random.Random(f"{seed}:{number}")
        person = {name: choose.choice(values) for name, values in self.person.items()}
        picture = {name: choose.choice(values) for name, values in self.picture.items()}
        changed = choose.sample(self.changes, choose.randint(1, min(MOST_CHANGES, len(self.changes))))
        others = {name: [value for value in self.picture[name] if value != picture[name]] for name in changed}
        changes = {name: choose.choice(values) for name, values in others.items()}
        return {"person": person, "picture_1": picture, "picture_2": changes}


def read_seed_lists(path: str | None = None) -> SeedLists:
    """The lists of a file, or the package's own.

    Raises:
        DatasetError: the file cannot be read or does not have the form of the package's `attributes.json`.
    """
    if path is None:
        content = json.loads(files("fafa.syncpr").joinpath("attributes.json").read_text(encoding="utf-8"))
    else:
        content = read_json(path)
    name = path or "attributes.json"
    return _checked(content, name)


def _checked(content: Any, name: str) -> SeedLists:
    def refuse(what: str) -> DatasetError:
        return DatasetError(f"--attributes {name}: {what}; the form is {_FORM}")

    if not isinstance(content, dict):
        raise refuse("it is not a JSON object")
    for part in ("person", "picture"):
        lists = content.get(part)
        if not isinstance(lists, dict) or not lists:
            raise refuse(f"{part!r} is missing or not an object")
        for key, values in lists.items():
            if not isinstance(values, list) or not values or not all(_is_text(value) for value in values):
                raise refuse(f"{part}.{key} is not a list of texts of one line each")
    changes = content.get("changes")
    if not isinstance(changes, list) or not changes or len(set(map(str, changes))) != len(changes):
        raise refuse("'changes' is missing, empty, or names something twice")
    for key in changes:
        if key not in content["picture"]:
            raise refuse(f"'changes' names {key!r}, which 'picture' does not have")
        if len(set(content["picture"][key])) < 2:
            raise refuse(f"picture.{key} may change, and needs two different values at least")
    canonical = json.dumps([content["person"], content["picture"], changes], ensure_ascii=False)
    digest = hashlib.sha256(canonical.encode("utf-8", "backslashreplace")).hexdigest()[:16]
    return SeedLists(content["person"], content["picture"], changes, digest)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()
