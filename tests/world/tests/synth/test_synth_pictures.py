"""Drawn people: their segmentation, colours, views, and the same pixels every time."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from tbps_world.synth.attributes import ABSENT, VALUES
from tbps_world.synth.body import LOWER, PARTS, UPPER
from tbps_world.synth.camera import FACINGS, exposed, occluder_box, sample_view
from tbps_world.synth.drawing import Drawing
from tbps_world.synth.palette import CLOTHES
from tbps_world.synth.streams import stream
from tbps_world.synth.world import PRESETS, Picture, World, camera_of, draw_picture

SMALL = World(PRESETS["small"])


@pytest.fixture(scope="module")
def drawings() -> list[tuple[Picture, Drawing]]:
    """Ninety people of preset small, from all splits, in all views."""
    pictures = [SMALL.picture(number, view) for number in range(0, 540, 6) for view in range(4)]
    return [(picture, draw_picture(picture, SMALL.settings)) for picture in pictures]


def test_pictures_have_the_declared_size_and_a_person(drawings) -> None:
    for _, drawing in drawings:
        assert drawing.picture.shape == (128, 64, 3) and drawing.picture.dtype == np.uint8
        assert drawing.parts.shape == (128, 64) and drawing.parts.dtype == np.uint8
        assert 0.08 < (drawing.parts > 0).mean() < 0.6
        assert drawing.parts.max() < len(PARTS)


def test_boxes_are_the_tight_extents_of_the_parts_and_areas_add_up(drawings) -> None:
    for _, drawing in drawings:
        for part, name in enumerate(PARTS[1:], start=1):
            rows, columns = np.nonzero(drawing.parts == part)
            if len(rows) == 0:
                assert name not in drawing.seen.boxes
                continue
            tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert drawing.seen.boxes[name] == tight
            assert drawing.seen.pixels[name] == len(rows)
        assert sum(drawing.seen.pixels.values()) == int((drawing.parts > 0).sum())


def test_the_stated_colour_is_the_dominant_one_of_the_garment(drawings) -> None:
    right = []
    for picture, drawing in drawings:
        for part, attribute in ((UPPER, "upper_colour"), (LOWER, "lower_colour")):
            names = VALUES[attribute]
            anchors = np.array([CLOTHES[name] for name in names])
            pixels = drawing.picture[drawing.parts == part].astype(int)
            nearest = ((pixels[:, None] - anchors) ** 2).sum(axis=2).argmin(axis=1)
            dominant = names[int(np.bincount(nearest).argmax())]
            right.append(dominant == getattr(picture.person, attribute))
    assert np.mean(right) >= 0.98


def test_both_garments_can_be_named_in_every_picture(drawings) -> None:
    for _, drawing in drawings:
        assert {"upper_type", "upper_colour", "lower_type", "lower_colour", "gender"} <= drawing.seen.visible


def test_nothing_absent_or_hidden_is_visible(drawings) -> None:
    for picture, drawing in drawings:
        person, seen = picture.person, drawing.seen
        for attribute in seen.visible:
            assert getattr(person, attribute) != ABSENT
        for thing in ("bag", "headwear"):
            assert (thing in seen.boxes) <= (getattr(person, f"{thing}_type") != ABSENT)
        if camera_of(picture, 0).facing == "back":
            assert "age" not in seen.visible
            if person.accessory in ("glasses", "phone"):
                assert "accessory" not in seen.boxes


def test_carried_things_are_usually_seen(drawings) -> None:
    for thing in ("bag", "headwear", "shoes", "hair"):
        kind = "hair_length" if thing == "hair" else f"{thing}_type"
        owners = [
            drawing.seen for picture, drawing in drawings if getattr(picture.person, kind) not in (ABSENT, "bald")
        ]
        assert np.mean([kind in seen.visible for seen in owners]) > 0.75


def test_the_figure_stays_inside_the_picture(drawings) -> None:
    for _, drawing in drawings:
        figure = drawing.parts > 0
        assert not figure[0].any() and not figure[-1].any()


def test_facing_follows_the_view_and_everybody_has_front_and_back() -> None:
    for view in range(8):
        assert camera_of(SMALL.picture(3, view), 0).facing == FACINGS[view % 4]
    assert FACINGS[:2] == ("front", "back")


def test_view_parameters_stay_in_their_ranges() -> None:
    views = [sample_view(index % 5, stream(1, "test", index, 0, "camera")) for index in range(2000)]
    assert all(850 <= view.scale <= 1000 and -60 <= view.shift_x <= 60 and -60 <= view.shift_y <= 60 for view in views)
    gains = np.array([view.gain for view in views]) / 256
    assert gains.min() >= 0.75 and gains.max() <= 1.2 and gains.min() < 0.8 and gains.max() > 1.15
    assert all(-6 <= offset <= 6 for view in views for offset in view.cast)
    assert 0.08 < np.mean([view.occluder is not None for view in views]) < 0.12


@pytest.mark.parametrize("kind", ["pole", "box"])
def test_an_occluder_hides_at_most_15_percent_of_the_figure(kind: str) -> None:
    for number in range(12):
        picture = SMALL.picture(number, number % 4)
        parts = draw_picture(replace(picture, may_be_hidden=False), SMALL.settings).parts
        for place in (0, 250, 500, 750, 999):
            view = replace(camera_of(picture, 0), occluder=(kind, place))
            hidden = parts[occluder_box(view, parts)]
            assert (hidden > 0).sum() <= 0.15 * (parts > 0).sum()
            for garment in (UPPER, LOWER):
                assert (hidden == garment).sum() <= 0.35 * (parts == garment).sum()


def test_noise_has_a_standard_deviation_of_three() -> None:
    view = replace(camera_of(SMALL.picture(0, 0), 0), gain=256, cast=(0, 0, 0))
    flat = np.full((512, 256, 3), 100, dtype=np.uint8)
    figure = np.full((256, 128), UPPER, dtype=np.uint8)
    noisy = exposed(flat, figure, view, stream(0, "test", 0, 0, "noise")).astype(float)
    assert abs(noisy.mean() - 100) < 0.1 and abs(noisy.std() - 3) < 0.1
    brighter = exposed(flat, figure, replace(view, gain=307, cast=(6, 0, -6)), stream(0, "test", 0, 0, "noise"))
    assert np.allclose(brighter.mean(axis=(0, 1)), [126, 120, 114], atol=0.2)


def test_another_outfit_leaves_the_face_as_it_is() -> None:
    person = SMALL.people[0]
    picture = SMALL.picture(0, 0)
    dressed = draw_picture(replace(picture, person=replace(person, upper_colour="green")), SMALL.settings)
    plain = draw_picture(picture, SMALL.settings)
    changed = (dressed.picture != plain.picture).any(axis=2)
    head = plain.parts == PARTS.index("head")
    # Pixels at the border of a part average two colours.
    inner = head[1:-1, 1:-1] & head[:-2, 1:-1] & head[2:, 1:-1] & head[1:-1, :-2] & head[1:-1, 2:]
    assert changed.any() and inner.any() and not changed[1:-1, 1:-1][inner].any()


def test_a_picture_depends_on_pool_item_view_and_seed_only() -> None:
    picture = SMALL.picture(7, 2)
    first = draw_picture(picture, SMALL.settings).picture
    assert (draw_picture(picture, SMALL.settings).picture == first).all()
    for other, settings in (
        (replace(picture, pool="other"), SMALL.settings),
        (replace(picture, item=8), SMALL.settings),
        (replace(picture, view=6), SMALL.settings),
        (picture, replace(SMALL.settings, seed=1)),
    ):
        assert (draw_picture(other, settings).picture != first).any()


def test_pixels_are_those_of_this_version_of_the_world() -> None:
    """If this fails the drawing has changed: raise `WORLD_VERSION`, then store the new digest."""
    digest = hashlib.sha256()
    for number in range(0, 550, 50):
        for view in range(5):
            drawing = draw_picture(SMALL.picture(number, view), SMALL.settings)
            digest.update(drawing.picture.tobytes() + drawing.parts.tobytes())
    assert digest.hexdigest() == "ba5a86d83715bc35e57d96dfe7749fc976b02a742fe67efe7d62d61f43a353db"
