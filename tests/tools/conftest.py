"""Fixtures that the tests of several tools use."""

import pytest
import torch
from mmengine.runner import Runner

from mmdense.apis import Predictor
from support import DEMOS


@pytest.fixture(autouse=True, scope='module')
def _fast_start():
    """Skip mmengine's report of the environment, which runs compilers for seconds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(Runner, '_log_env', lambda self, env_cfg: None)
    yield
    patch.undo()


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    """A folder with random weights of the demos, TASK.pth: the detector's scores are about 0.1."""
    folder = tmp_path_factory.mktemp('weights')
    for task, config in DEMOS.items():
        torch.manual_seed(0)
        model = Predictor(config, device='cpu').model
        torch.save(dict(state_dict=model.state_dict(), meta={}), folder / f'{task}.pth')
    return folder
