"""Transforms against the stored pictures of the released code, and their geometry against the formulas."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor, v2

from fafa import transforms
from fafa.transforms import MEAN, STD, RandomCrop, SquarePad, TargetPad, build_transforms, normalised
from tbps_common.errors import InputError


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.golden("fafa")
def test_transforms_match_the_released_code(golden: Any) -> None:
    case = golden("transforms")
    expected, tolerance = case.tensors(), case.case["tolerance"]["atol"]
    assert case.case["items"]
    for item in case.case["items"]:
        with Image.open(case.folder / f"{item['image']}.png") as opened:
            image = opened.convert("RGB")
        transform = getattr(transforms, item["fn"])(*item["args"])
        if "torch_seed" in item:
            torch.manual_seed(item["torch_seed"])
        stored = expected[f"expected.{item['key']}"]
        torch.testing.assert_close(transform(image), stored, atol=tolerance, rtol=0, msg=item["key"])


@pytest.mark.golden("fafa")
def test_training_transform_refuses_a_picture_smaller_than_its_crop(golden: Any) -> None:
    case = golden("transforms")
    with Image.open(case.folder / "portrait.png") as opened, pytest.raises(ValueError, match="does not fit"):
        transforms.squarepad_transform_train(36)(opened.convert("RGB"))


@pytest.mark.parametrize("name", ["squarepad", "targetpad", "resize"])
def test_pictures_end_as_torchvisions_first_transforms_end_them(name: str) -> None:
    """To the bit; `v2.ToDtype` multiplies by the inverse of 255, which differs in the last place."""
    tail = Compose([ToTensor(), Normalize(MEAN, STD)])
    pipeline, image = build_transforms(name, 32).test, picture(192, 384)
    small = image
    for step in pipeline.steps:
        small = step(small)
    assert torch.equal(pipeline(image), tail(small))
    together = torch.stack([pipeline.pixels(image)] * 2)
    assert together.dtype == torch.uint8 and torch.equal(normalised(together)[1], pipeline(image))


@pytest.mark.parametrize(("width", "height"), [(192, 384), (173, 365), (40, 97), (230, 420), (172, 364), (212, 364)])
@pytest.mark.parametrize("size", [(384, 192), (20, 30), (21, 30)])
def test_one_paste_pads_crops_and_pads_as_three_steps_do(width: int, height: int, size: tuple[int, int]) -> None:
    image = picture(width, height)
    apart = v2.Compose([v2.Pad(10), RandomCrop(size), SquarePad()])
    at_once = RandomCrop(size, padding=10, square=True)
    if width + 20 < size[1] or height + 20 < size[0]:
        for steps in (apart, at_once):
            with pytest.raises(ValueError, match=f"{height + 20} x {width + 20}"):
                steps(image)
        return
    for seed in range(12):
        results = []
        for steps in (apart, at_once):
            torch.manual_seed(seed)
            results.append((np.asarray(steps(image)), torch.rand(1)))
        assert np.array_equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("width", "height"), [(192, 384), (40, 97), (97, 40), (50, 50), (1, 400)])
def test_square_pad_is_centred_and_black(width: int, height: int) -> None:
    image = picture(width, height)
    padded = SquarePad()(image)
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    assert padded.size == (width + 2 * left, height + 2 * top)
    assert side - 1 <= min(padded.size) <= max(padded.size) == side
    assert np.array_equal(np.asarray(padded.crop((left, top, left + width, top + height))), np.asarray(image))
    assert np.asarray(padded, dtype=np.int64).sum() == np.asarray(image, dtype=np.int64).sum()


@pytest.mark.parametrize("ratio", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("width", "height"), [(192, 384), (100, 120), (300, 31), (64, 64)])
def test_target_pad_reaches_the_ratio_and_no_further(ratio: float, width: int, height: int) -> None:
    image = picture(width, height)
    padded = TargetPad(ratio)(image)
    if max(width, height) / min(width, height) < ratio:
        assert padded is image
        return
    side = max(width, height) / ratio
    assert padded.size == tuple(length + 2 * max(int((side - length) / 2), 0) for length in (width, height))
    assert max(padded.size) == max(width, height)
    assert abs(min(padded.size) - side) <= 2


def test_random_crop_draws_top_then_left() -> None:
    image = picture(30, 40)
    torch.manual_seed(3)
    cropped = RandomCrop((25, 20))(image)
    torch.manual_seed(3)
    top, left = int(torch.randint(0, 16, (1,))), int(torch.randint(0, 11, (1,)))
    assert np.array_equal(np.asarray(cropped), np.asarray(image)[top : top + 25, left : left + 20])
    before = torch.get_rng_state()
    assert RandomCrop((40, 30))(image) is image
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["squarepad", "targetpad", "resize"])
@pytest.mark.parametrize("side", [28, 37])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_every_pipeline_gives_square_normalised_pictures(name: str, side: int, mode: str) -> None:
    pair = build_transforms(name, side)
    for transform in (pair.train, pair.test):
        tensor = transform(picture(192, 384, mode))
        assert tensor.shape == (3, side, side)
        assert tensor.dtype == torch.float32
        white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
        black = -torch.tensor(MEAN) / torch.tensor(STD)
        assert bool((tensor <= white[:, None, None] + 1e-6).all())
        assert bool((tensor >= black[:, None, None] - 1e-6).all())


def test_only_the_named_transforms_augment() -> None:
    image = picture(192, 384)
    for name, varies in (("squarepad", True), ("resize", True), ("targetpad", False)):
        pair = build_transforms(name, 32)
        torch.manual_seed(0)
        several = torch.stack([pair.train(image) for _ in range(6)])
        assert bool((several != several[0]).any()) is varies
        before = torch.get_rng_state()
        assert torch.equal(pair.test(image), pair.test(image))
        assert torch.equal(before, torch.get_rng_state())


def test_sentences_and_unknown_names() -> None:
    assert build_transforms("squarepad", 8).sentence == "Square pad preprocess pipeline is used"
    assert (
        build_transforms("targetpad", 8, 1.5).sentence
        == "Target pad with target_ratio = 1.5 preprocess pipeline is used"
    )
    with pytest.raises(InputError, match="squarepad, targetpad or resize"):
        build_transforms("crop", 8)
