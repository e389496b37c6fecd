"""Fixtures for runs of mmengine's runner."""

import pytest
from mmengine.registry import DefaultScope
from mmengine.runner import Runner


@pytest.fixture(autouse=True)
def _plain_runs(monkeypatch):
    """Skip the environment report, which takes longer than the runs; forget the default scope."""
    monkeypatch.setattr(Runner, '_log_env', lambda self, env_cfg: None)
    yield
    DefaultScope._instance_dict.clear()
