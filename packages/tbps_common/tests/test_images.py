"""read_image on everything a download may hold: each colour mode, each kind of damage, each size."""

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tbps_common import images
from tbps_common.datasets import DatasetError, read_image
from tbps_common.errors import ImageError
from tbps_common.images import find_damage

HEIGHT, WIDTH = 40, 24


def picture(seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that every format has something to compress."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = np.random.default_rng(seed).integers(0, 20, (HEIGHT, WIDTH, 3))
    base = np.stack([rows * 5, columns * 8, rows + columns], axis=2)
    return Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def gif_header(width: int, height: int) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0, 0, 0)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08\x02\x4c\x01\x00;"


def bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def ppm_header(width: int, height: int) -> bytes:
    return f"P6 {width} {height} 255\n".encode()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats_return_the_stored_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    picture().save(path, lossless=True)  # known to WebP only, ignored by the others
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(picture()))
    assert find_damage(path) is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    source = picture()
    if mode == "I;16":
        source = Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, np.uint16))
    elif mode == "LA":
        source = source.convert("L").convert("LA")
    else:
        source = source.convert(mode)
    suffix = {"CMYK": "tiff", "YCbCr": "jpg"}.get(mode, "png")
    path = tmp_path / f"a.{suffix}"
    source.save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))


def test_16_bit_greyscale_keeps_its_upper_byte(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    grey = np.asarray(read_image(tmp_path / "a.png"))
    assert np.abs(grey[..., 0].astype(int) - (values >> 8)).max() <= 1  # one step of rounding


@pytest.mark.parametrize("kind", ["PGM", "PGM of 1,000 steps", "TIFF, big-endian", "TIFF, little-endian"])
def test_every_16_bit_grey_keeps_its_upper_byte(tmp_path: Path, kind: str) -> None:
    largest = 1000 if "steps" in kind else 65535
    values = np.linspace(0, largest, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round()
    path = tmp_path / ("a.pgm" if "PGM" in kind else "a.tiff")
    if "PGM" in kind:
        path.write_bytes(f"P5 {WIDTH} {HEIGHT} {largest}\n".encode() + values.astype(">u2").tobytes())
    else:
        big = "big" in kind
        grey = Image.frombytes(
            "I;16B" if big else "I;16", (WIDTH, HEIGHT), values.astype(">u2" if big else "<u2").tobytes()
        )
        grey.save(path)
    assert find_damage(path) is None
    found = np.asarray(read_image(path))[..., 0].astype(float)
    assert np.abs(found - values / largest * 255).max() <= 1.5


@pytest.mark.parametrize(("mode", "words"), [("I", "32-bit integers"), ("F", "floating-point numbers")])
def test_numbers_without_a_range_are_refused_and_the_check_says_so(tmp_path: Path, mode: str, words: str) -> None:
    picture().convert(mode).save(tmp_path / "a.tiff")
    with pytest.raises(ImageError, match=words):
        read_image(tmp_path / "a.tiff")
    assert words in str(find_damage(tmp_path / "a.tiff"))


def test_pictures_of_ones_own_are_read_as_a_viewer_shows_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "a.png", exif=exif)
    shown = read_image(tmp_path / "a.png", as_shown=True)
    assert np.array_equal(np.asarray(shown), np.rot90(np.asarray(picture()), -1))
    hidden = picture().convert("RGBA")
    hidden.putalpha(0)
    hidden.save(tmp_path / "b.png")
    assert np.asarray(read_image(tmp_path / "b.png", as_shown=True)).min() == 255
    palette = picture().convert("P")
    palette.save(tmp_path / "c.png", transparency=bytes(256))
    assert np.asarray(read_image(tmp_path / "c.png", as_shown=True)).min() == 255


def test_colours_under_transparency_are_kept(tmp_path: Path) -> None:
    source = picture().convert("RGBA")
    source.putalpha(0)
    source.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(picture()))


def test_palette_with_transparency_table(tmp_path: Path) -> None:
    palette = picture().convert("P")
    palette.save(tmp_path / "a.png", transparency=bytes(range(200)))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(palette.convert("RGB")))


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif").getpixel((3, 3)) == (255, 0, 0)


def test_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to show
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (WIDTH, HEIGHT)


def test_wrong_extension_is_read_by_content(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.jpg")), np.asarray(picture()))


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
@pytest.mark.parametrize("twentieth", range(20))
def test_truncated_files_give_a_picture_or_a_sentence(tmp_path: Path, suffix: str, twentieth: int) -> None:
    whole = tmp_path / f"whole.{suffix}"
    picture().save(whole)
    data = whole.read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) * twentieth // 20])
    assert find_damage(path) is not None or suffix in ("gif", "tiff")  # these may lose a trailer without harm
    try:
        image = read_image(path)
    except DatasetError as error:
        assert str(path) in str(error) and str(error).endswith(".") and "\n" not in str(error)
    else:
        assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "the process-wide switch must not stay on"


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_truncation_keeps_the_rows_that_are_there(tmp_path: Path, suffix: str) -> None:
    large = picture().resize((WIDTH * 8, HEIGHT * 8))
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    large.save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    expected, found = np.asarray(read_image(whole)), np.asarray(read_image(cut))
    rows = slice(HEIGHT * 4, None) if suffix == "bmp" else slice(0, HEIGHT * 4)  # BMP stores the last row first
    assert np.array_equal(found[rows], expected[rows])
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"not an image",
        b"<svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n",
    ],
    ids=["empty", "zeros", "text", "svg", "eps", "png-start"],
)
def test_files_that_are_no_image_are_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="cannot be read: it is empty or not an image") as caught:
        read_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("header", [png_header, gif_header, bmp_header, ppm_header])
@pytest.mark.parametrize("side", [8001, 9999, 12_000, 20_000, 60_000])
def test_bombs_are_refused_by_their_header(tmp_path: Path, header, side: int) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(header(side, side))
    with pytest.raises(DatasetError, match="more than 64,000,000 pixels") as caught:
        read_image(path)
    assert str(path) in str(caught.value) and "TBPS_MAX_IMAGE_PIXELS" in str(caught.value)
    assert "64,000,000" in (find_damage(path) or "")


def test_the_pixel_limit_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    monkeypatch.setenv("TBPS_MAX_IMAGE_PIXELS", str(HEIGHT * WIDTH))
    assert read_image(path).size == (WIDTH, HEIGHT)
    monkeypatch.setenv("TBPS_MAX_IMAGE_PIXELS", str(HEIGHT * WIDTH - 1))
    with pytest.raises(DatasetError, match=f"more than {HEIGHT * WIDTH - 1:,} pixels"):
        read_image(path)


def test_a_raised_limit_raises_pillows_too_but_never_lifts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 4)
    monkeypatch.setenv("TBPS_MAX_IMAGE_PIXELS", str(HEIGHT * WIDTH))
    picture().save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (WIDTH, HEIGHT)
    assert Image.MAX_IMAGE_PIXELS == HEIGHT * WIDTH


@pytest.mark.parametrize("value", ["many", "-5", "0", "1e9", "12.5"])
def test_an_unusable_pixel_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TBPS_MAX_IMAGE_PIXELS", value)
    with pytest.raises(DatasetError, match="TBPS_MAX_IMAGE_PIXELS must be a number"):
        read_image(tmp_path / "a.png")


def test_missing_file_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="absent.png cannot be read: the file does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(DatasetError, match="cannot be read: it is a folder"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DatasetError, match="cannot be read: it is a folder or a device"):
        read_image(tmp_path / "pipe.png")
    with pytest.raises(DatasetError, match="null"):
        read_image("a\0b.png")


class _Flaky:
    """`open` that fails a number of times with an I/O error."""

    def __init__(self, failures: int) -> None:
        self.left = failures
        self.calls = 0

    def __call__(self, path, mode):
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open(path, mode)


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_passing_io_errors_are_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    picture().save(tmp_path / "a.png")
    flaky = _Flaky(failures)
    monkeypatch.setattr(images, "open", flaky, raising=False)
    monkeypatch.setattr(images.time, "sleep", lambda seconds: None)
    assert read_image(tmp_path / "a.png", retries=3).size == (WIDTH, HEIGHT)
    assert flaky.calls == failures + 1


def test_retries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "a.png")
    flaky = _Flaky(100)
    monkeypatch.setattr(images, "open", flaky, raising=False)
    monkeypatch.setattr(images.time, "sleep", lambda seconds: None)
    with pytest.raises(DatasetError, match="a.png cannot be read: Input/output error"):
        read_image(tmp_path / "a.png", retries=3)
    assert flaky.calls == 4


def test_a_missing_file_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.time, "sleep", lambda seconds: pytest.fail("waited for a file that does not exist"))
    with pytest.raises(DatasetError):
        read_image(tmp_path / "absent.png")


def test_bit_flips_give_a_picture_or_a_sentence(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    outcomes = set()
    for suffix in ("png", "jpg", "webp", "tiff"):
        whole = tmp_path / f"whole.{suffix}"
        picture().save(whole)
        data = np.frombuffer(whole.read_bytes(), np.uint8)
        for number in range(40):
            flipped = data.copy()
            flipped[generator.integers(0, len(data), 3)] ^= generator.integers(1, 256, 3).astype(np.uint8)
            path = tmp_path / f"{number}.{suffix}"
            path.write_bytes(flipped.tobytes())
            try:
                outcomes.add(read_image(path).mode)
            except DatasetError as error:
                assert str(path) in str(error)
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}
