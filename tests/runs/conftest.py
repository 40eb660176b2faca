"""Whole runs go through optax's schedules, which mix ints and floats on purpose."""

import pytest


@pytest.fixture(autouse=True)
def strict_arithmetic():
    """Overrides the strict setting of the folder above."""
