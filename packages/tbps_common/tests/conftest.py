"""What several tests of this package share."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLOS of random weights, which finds persons where chance wants them."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        num_detection_tokens=5, id2label={0: "person", 1: "dog"}, label2id={"person": 0, "dog": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
