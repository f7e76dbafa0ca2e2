"""A generation run: images batch by batch, each listed once it is on the disk; killed and run again without loss."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dp_gen.contact_sheet import SheetLine, write_contact_sheet
from dp_gen.run_settings import require_same_settings, store_settings
from tbps_common.files import atomic_path, write_text
from tbps_common.images import read_image
from tbps_common.pipeline.journal import Journal, read_json_lines
from tbps_common.pipeline.stages import Shard
from tbps_common.report.pictures import spread
from tbps_common.run.progress import Progress
from tbps_common.run.stop import Interruption

STEM = "edits"
MANIFEST, SETTINGS_NAME, SHEET = f"{STEM}.jsonl", "generate_settings.json", "contact_sheet.png"
_MANIFEST_NAMES = rf"{STEM}\.(\d+-of-\d+\.)?jsonl"  # with --shard, each machine has its own
_SHEET_LINES = 12

Row = dict[str, Any]
"""One image in the manifest: `file`, `references`, `reference_attribute_list`, `caption`, ..."""

Produce = Callable[[Sequence[Any]], Sequence[tuple[Image.Image, Row]]]
Originals = Callable[[Row], Path]


class Run:
    """Generation into a folder.

    Args:
        root: the folder; nothing is written before `make`.
        settings: flags that the images depend on.

    Raises:
        InputError: the folder was begun with other settings.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self.root, self.settings = root, settings
        require_same_settings(root / SETTINGS_NAME, settings)

    def make(
        self,
        tasks: Sequence[Any],
        produce: Produce,
        *,
        batch_size: int,
        shard: Shard,
        originals: Originals | None = None,
    ) -> int:
        """Make the images that are missing; returns the exit status.

        Args:
            tasks: everything to make, of all shards; the name of each is its file.
            produce: a batch of tasks -> images with their rows.
            batch_size: tasks at a time.
            shard: which of them this process makes.
            originals: row -> the image that was edited.

        Raises:
            InputError: another process makes the same, or whatever `produce` raises.
            OSError: a file cannot be written; the images before it are safe.
        """
        store_settings(self.root / SETTINGS_NAME, self.settings)
        own = shard.of(tasks)
        with Journal(shard.file(self.root, STEM)) as manifest:
            made = self.rows()
            missing = [task for task in own if task.name not in made]
            print(f"{len(own)} images, {len(own) - len(missing)} of them made before")
            with Interruption() as interruption, Progress(len(missing), unit="image") as progress:
                for start in range(0, len(missing), batch_size):
                    if interruption.requested:
                        print("stopped; the same command makes the missing images", file=sys.stderr)
                        return interruption.exit_status
                    for image, row in produce(missing[start : start + batch_size]):
                        save_image(image, self.root / row["file"])
                        manifest.append(row)
                        progress.update()
        self._conclude([task.name for task in tasks], originals)
        return 0

    def rows(self) -> dict[str, Row]:
        """Manifest lines by file name, of all shards, as far as their images are there."""
        manifests = [path for path in self.root.glob(f"{STEM}.*jsonl") if re.fullmatch(_MANIFEST_NAMES, path.name)]
        rows = [row for path in sorted(manifests) for _, row in read_json_lines(path) if isinstance(row, dict)]
        return {str(row["file"]): row for row in rows if (self.root / str(row.get("file"))).is_file()}

    def _conclude(self, names: list[str], originals: Originals | None) -> None:
        """List the images in order, and draw some of them; the last of several shards does it for all."""
        rows = self.rows()
        left = sum(name not in rows for name in names)
        if left:
            print(f"{left} of {len(names)} images are left to the other shards")
            return
        order = {name: place for place, name in enumerate(names)}
        listed = sorted(rows.values(), key=lambda row: (order.get(row["file"], len(order)), row["file"]))
        write_text(self.root / MANIFEST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed))
        self._draw([rows[name] for name in names], originals)
        print(f"{len(names)} images listed in {self.root / MANIFEST}; some of them in {self.root / SHEET}")

    def _draw(self, rows: list[Row], originals: Originals | None) -> None:
        lines = []
        for place in spread(range(len(rows)), _SHEET_LINES):
            row = rows[place]
            pictures = [("original", read_image(originals(row)))] if originals else []
            files = [Path(file) for file in row["references"]]
            names = zip(row["reference_attribute_list"], files)
            pictures += [(phrase, read_image(file)) for phrase, file in names if file.is_file()]
            pictures.append((row["file"], read_image(self.root / row["file"])))
            lines.append(SheetLine(pictures, [(row["caption"], "black")]))
        write_contact_sheet(self.root / SHEET, lines)


def save_image(image: Image.Image, path: Path) -> None:
    """JPEG of high quality or PNG, as the name ends; whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_path(path, one_writer=True) as temporary:
        if path.suffix == ".jpg":
            image.save(temporary, format="JPEG", quality=95, subsampling=0)  # full colour resolution
        else:
            image.save(temporary, format="PNG")
