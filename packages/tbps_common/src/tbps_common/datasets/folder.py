"""A folder which names stored in an annotation file must not leave."""

import os
import posixpath
import re

_SURROGATE = re.compile("[\ud800-\udfff]")
_DRIVE = re.compile("[A-Za-z]:")


class Folder:
    """Joins stored names to a folder, by rules that look at the name only: no file system call per image.

    Back-slashes count as separators, so that a list made on Windows works everywhere and cannot smuggle in a climb.
    """

    __slots__ = ("path", "_prefix")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._prefix = os.path.join(self.path, "")

    def __str__(self) -> str:
        return self.path or "the working folder"

    def problem(self, name: str) -> str | None:
        """Why `name` is refused; `None` if it stays inside the folder."""
        if name.isascii() and name[:1].isalnum() and ".." not in name and "\\" not in name and ":" not in name[:2]:
            if "\0" not in name and name[-1] != "/":
                return None  # the common case, decided without splitting the name
        if "\0" in name:
            return "holds a NUL character"
        if _SURROGATE.search(name):
            return "holds half of a surrogate pair"
        plain = name.replace("\\", "/")
        if plain.startswith("/") or _DRIVE.match(plain):
            return "is an absolute path"
        normal = posixpath.normpath(plain)
        if normal == "." or plain.endswith("/"):
            return "names a folder, not a file"
        if normal == ".." or normal.startswith("../"):
            return "climbs out of the folder"
        return None

    def join(self, name: str) -> str:
        """`folder/name`; a name that goes up and down inside the folder is normalised. Ask `problem` first."""
        if "\\" in name:
            name = name.replace("\\", "/")
        if ".." in name:
            name = posixpath.normpath(name)
        return self._prefix + name
