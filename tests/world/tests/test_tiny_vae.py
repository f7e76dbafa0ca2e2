from types import SimpleNamespace

import pytest

from tbps_world.tiny.vae import start_as_mean_colours


@pytest.mark.parametrize(
    ("latents", "widths", "groups"), [(8, (8, 16), 4), (4, (4, 8), 2), (4, (8, 16), 8), (4, (8, 12), 4)]
)
def test_other_sizes_are_refused(latents, widths, groups):
    settings = SimpleNamespace(latent_channels=latents, block_out_channels=widths, norm_num_groups=groups)
    with pytest.raises(ValueError, match="it needs 4, widths of 8 or more"):
        start_as_mean_colours(SimpleNamespace(config=settings))
