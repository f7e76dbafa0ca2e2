"""`python -m tbps_world.practice.syncpr`: a chat server on this machine that answers the questions of this pipeline by a rule.

It turns attribute combinations into plain sentences, and says yes to every pair whose pictures are neither blank nor the
same; so the stages can be tried without a model and without a key that is worth anything.
"""

import base64
import io
import json
import sys
import zlib
from collections.abc import Mapping
from typing import Any

from fafa.syncpr.prompts import QUESTION_KEYS
from tbps_common.run.command import command
from tbps_world.practice.server import serve

_WORN = ("upper", "lower", "shoes", "headwear")
_NOTHING = "nothing "


def answer(messages: list[dict[str, Any]]) -> str:
    """The answer to a question of `quadruple_messages` or `question_messages`."""
    content = messages[-1]["content"]
    if isinstance(content, list):
        return _verdict(content)
    people = [json.loads(line) for line in str(content).splitlines() if line.startswith('{"person"')]
    if not people:
        return "This server only answers the questions of fafa-syncpr, and this is another one."
    return json.dumps([_quadruple(person) for person in people], ensure_ascii=False)


def _quadruple(given: dict[str, Any]) -> dict[str, str]:
    person, first, changes = given["person"], given["picture_1"], given["picture_2"]
    second = {**first, **changes}
    style = zlib.crc32(json.dumps(given, sort_keys=True).encode())
    return {
        "caption_1": _caption(person, first, style),
        "caption_2": _caption(person, second, style // 7),
        "edit_1_to_2": _edit(changes, style),
        "edit_2_to_1": _edit({name: first[name] for name in changes}, style // 3),
    }


def _caption(person: Mapping[str, str], picture: Mapping[str, str], style: int) -> str:
    who = f"a {person.get('gender', 'person')}"
    for name, form in (("age", "{}"), ("build", "of {} build"), ("hair", "with {}")):
        if name in person:
            who += " " + form.format(person[name])
    worn = _listed([picture[name] for name in _WORN if _shown(picture, name)])
    carried = picture["belongings"] if _shown(picture, "belongings") else ""
    rest = [value for name, value in picture.items() if name not in (*_WORN, "belongings")]
    forms = (
        f"{who} is wearing {worn}" + (f" and carrying {carried}" if carried else ""),
        f"the picture shows {who}, dressed in {worn}" + (f" and holding {carried}" if carried else ""),
        (f"with {carried}, " if carried else "") + f"{who} wears {worn}",
    )
    return _sentence(", ".join([forms[style % len(forms)], *rest]))


def _edit(changes: Mapping[str, str], style: int) -> str:
    worn = [changes[name] for name in _WORN if name in changes]
    parts = [("now wearing ", "change to ", "in ")[style % 3] + _listed(worn)] if worn else []
    if "belongings" in changes:
        parts.append(f"now with {changes['belongings']}")
    parts += [f"now {value}" for name, value in changes.items() if name not in (*_WORN, "belongings")]
    return _sentence(" and ".join(parts))


def _shown(picture: Mapping[str, str], name: str) -> bool:
    return name in picture and not picture[name].startswith(_NOTHING)


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases) or "plain clothes"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _verdict(content: list[dict[str, Any]]) -> str:
    from PIL import Image, ImageChops, ImageStat

    urls = [part["image_url"]["url"] for part in content if part.get("type") == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in urls]
    blank = any(max(ImageStat.Stat(picture).stddev) < 1 for picture in pictures)
    first, last = pictures[0], pictures[-1].resize(pictures[0].size)
    same = max(ImageStat.Stat(ImageChops.difference(first, last)).mean) < 1
    return json.dumps(dict.fromkeys(QUESTION_KEYS, not (blank or same)))


@command
def main(argv: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    purpose = "answers by a rule, to try fafa-syncpr"
    return serve(argv, answer, module="tbps_world.practice.syncpr", port=8809, purpose=purpose)


if __name__ == "__main__":
    sys.exit(main())
