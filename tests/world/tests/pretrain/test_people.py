from dataclasses import replace

import numpy as np

from tbps_world.pretrain.people import described, shots, start_people, toy_people
from tbps_world.synth.world import PRESETS, World, resized


def test_no_toy_draws_a_start_persons() -> None:
    people = {described(person) for person in start_people(1000)}
    assert len(people) == 1000 and not people & toy_people()
    for seed, identities in ((0, 1100), (0, 44), (1, 550)):
        world = World(resized(replace(PRESETS["small"], seed=seed), identities))
        assert {described(person) for person in world.people} <= toy_people()


def test_shots_show_and_describe_everybody() -> None:
    people = start_people(6)
    found = list(shots(people, views=4, height=64))
    assert [(shot.number, shot.facing) for shot in found[:5]] == [
        (0, "front"), (0, "back"), (0, "right"), (0, "left"), (1, "back"),
    ]  # fmt: skip
    assert [shot.facing for shot in shots(people[:2], views=2, height=64)] == ["front", "right", "back", "left"]
    for shot, again in zip(found, shots(people, views=4, height=64)):
        assert shot.drawing.picture.shape == (64, 32, 3) and shot.person == people[shot.number]
        assert np.array_equal(shot.drawing.picture, again.drawing.picture) and shot.captions == again.captions
        assert len({caption.text for caption in shot.captions}) == 2
        for caption in shot.captions:
            assert caption.facts.items() <= {name: getattr(shot.person, name) for name in caption.facts}.items()
