"""Isolation of configs from each other."""

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def _no_default_scope():
    yield
    DefaultScope._instance_dict.clear()
