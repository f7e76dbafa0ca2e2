"""What is not run unless asked for."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full_size" not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason="takes minutes: -m full_size")
        for item in items:
            if item.get_closest_marker("full_size"):
                item.add_marker(skip)
