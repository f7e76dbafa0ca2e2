"""Opening images that others made: any colour mode becomes RGB, damage is tolerated or named, bombs are refused."""

import os
import stat
import threading
import time
from collections.abc import Iterable
from typing import IO

from PIL import (
    Image,
    ImageFile,
    ImageOps,
    TiffImagePlugin,  # noqa: F401 - opening by a list of formats fails for those whose plugin nobody has imported
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from tbps_common.errors import DatasetError, ImageError

PIXEL_LIMIT = 64_000_000
PIXEL_LIMIT_VARIABLE = "TBPS_MAX_IMAGE_PIXELS"

# Raster formats person data sets come in. Others stay closed: Pillow would start Ghostscript for an EPS file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Endings of files in these formats, as they are looked for in a folder of pictures.
SUFFIXES = tuple(".bmp .dib .gif .jpg .jpeg .jpe .jfif .png .apng .ppm .pgm .pbm .pnm .tif .tiff .webp".split())

_PERMANENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, UnidentifiedImageError)
_SHOWN = 5
_TRUNCATED_SWITCH = threading.Lock()


def read_image(path: str | os.PathLike[str], retries: int = 3, *, as_shown: bool = False) -> Image.Image:
    """Read an image file as RGB.

    The stored pixels are returned as they lie in the file, as the released readers do: the first frame of an
    animation, no rotation by EXIF, transparency dropped. 16-bit greyscale keeps its upper 8 bits. The missing part of a
    truncated file stays black or grey.

    Args:
        path: JPEG, PNG, BMP, GIF, PPM, TIFF or WebP file; the content decides, not the name.
        retries: how often reading is tried again after a passing I/O error (a network drive, say).
        as_shown: for a user's own pictures: turned as EXIF says, and transparent parts laid on white, as a viewer shows
            them.

    Returns:
        A loaded picture of mode RGB; no file stays open.

    Raises:
        ImageError: the file is missing, is not an image, cannot be decoded, holds numbers without a known range (32-bit
            integers, floating point), or has more pixels than 64 million (or than the environment variable
            TBPS_MAX_IMAGE_PIXELS says); names the file and the cause.
        DatasetError: TBPS_MAX_IMAGE_PIXELS is not a number.
    """
    limit = pixel_limit()
    for attempt in range(retries + 1):
        try:
            return _read(path, limit, as_shown)
        except DatasetError:
            raise
        except OSError as error:
            if isinstance(error, _PERMANENT) or error.errno is None or attempt == retries:
                raise _unreadable(path, error) from error
            time.sleep(0.05 * 2**attempt)
        except Exception as error:  # decoders answer damage with SyntaxError, struct.error, zlib.error, KeyError, ...
            raise _unreadable(path, error) from error
    raise ValueError(f"retries must be at least 0, not {retries}.")


def find_damage(path: str | os.PathLike[str]) -> str | None:
    """Decode the whole file without tolerance for truncation; `None` if it is sound, else what is wrong with it.

    Raises:
        DatasetError: TBPS_MAX_IMAGE_PIXELS is not a number.
    """
    limit = pixel_limit()
    try:
        with _open(path) as file, _identify(path, file, limit) as image:
            image.load()
            _in_8_bits(image)
    except Exception as error:  # see read_image
        return _cause(error)
    return None


def pixel_limit() -> int:
    """Largest accepted width x height, from TBPS_MAX_IMAGE_PIXELS or 64 million.

    Raises:
        DatasetError: the environment variable is not a positive whole number.
    """
    value = os.environ.get(PIXEL_LIMIT_VARIABLE, "").strip()
    if not value:
        return PIXEL_LIMIT
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise DatasetError(
            f"The environment variable {PIXEL_LIMIT_VARIABLE} must be a number of pixels, not {value!r}."
        )
    limit = int(value)
    # Pillow's own limit would come first; raising ours asks for both. It is never switched off.
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit
    return limit


def _read(path: str | os.PathLike[str], limit: int, as_shown: bool) -> Image.Image:
    try:
        with _open(path) as file:
            return _decode(path, file, limit, as_shown)
    except DatasetError:
        raise
    except Exception as error:  # see read_image
        if isinstance(error, OSError) and error.errno is not None:
            raise
    # Pillow tolerates damage by a process-wide switch only. It is on just for the rare file that needs it, so that other
    # code in the process still sees damage as an error.
    with _TRUNCATED_SWITCH, _open(path) as file:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            return _decode(path, file, limit, as_shown)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _open(path: str | os.PathLike[str]) -> IO[bytes]:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would block for ever
        raise IsADirectoryError("it is a folder or a device, not a file")
    return open(path, "rb")


def _decode(path: str | os.PathLike[str], file: IO[bytes], limit: int, as_shown: bool) -> Image.Image:
    with _identify(path, file, limit) as opened:
        opened.load()
        image = _in_8_bits(opened)
        if as_shown:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns about the direct way
        return image.convert("RGB")  # a copy that needs no open file, also where the mode is RGB already


def _in_8_bits(image: Image.Image) -> Image.Image:
    """The picture itself, or the upper 8 bits of a 16-bit grey one, which `convert` alone would clip to white.

    Raises:
        ValueError: the values have no known range.
    """
    # Pillow reads a PGM of more than 8 bits as integers, scaled to 16 bits whatever its largest value is.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        import numpy as np  # for the rare picture that needs it

        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        grey.info = image.info
        return grey
    if image.mode in ("I", "F"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"it holds {kind}, whose range is unknown: save it with 8 bits per colour")
    return image


def _identify(path: str | os.PathLike[str], file: IO[bytes], limit: int) -> Image.Image:
    """Open by the header alone and refuse more pixels than `limit` before any is decoded."""
    try:
        image = Image.open(file, formats=FORMATS)
        pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # over Pillow's limit, hence over ours
        pixels = limit + 1
    if pixels > limit:
        raise ImageError(
            f"The image {os.fspath(path)} says it has more than {limit:,} pixels; "
            f"delete it, or raise the limit with the environment variable {PIXEL_LIMIT_VARIABLE}."
        )
    return image


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ImageError:
    return ImageError(f"The image {os.fspath(path)!s} cannot be read: {_cause(error)}.")


def _cause(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, UnidentifiedImageError):
        return "it is empty or not an image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().rstrip(".") or type(error).__name__


def missing_images(paths: Iterable[str]) -> list[str]:
    """The paths that are no file's, sorted; one listing per folder instead of one look-up per image."""
    listings: dict[str, set[str]] = {}
    missing = set()
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            missing.add(path)
    return sorted(missing)


def first_on_this_machine() -> bool:
    """Whether this is the one process of its machine that looks for image files, where torchrun has started several."""
    return os.environ.get("LOCAL_RANK", "").strip() in ("", "0")


def check_images_exist(paths: Iterable[str], root: str, *, flag: str) -> None:
    """Require every image file. Of several processes on a machine only the first looks for them.

    Args:
        paths: of the image files.
        root: folder that holds the data set, for the message.
        flag: the command's flag that names it, for the message.

    Raises:
        DatasetError: images are missing; the first five are named.
    """
    missing = missing_images(paths) if first_on_this_machine() else []
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise DatasetError(
            f"{len(missing)} images named by the annotations under {root} are missing ({shown}): unpack all images of "
            f"the data set, or check {flag}"
        )
