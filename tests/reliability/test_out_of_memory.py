"""Out of memory: simulated in training on a GPU, real in testing on a CPU."""

import sys

import pytest
import torch

from support import DEMOS, ROOT

pytestmark = pytest.mark.slow

DETECTOR = """
import torch
from mmdet.models import FasterRCNN
from mmengine.registry import MODELS

@MODELS.register_module()
class Greedy(FasterRCNN):
    def loss(self, inputs, samples):
        raise torch.cuda.OutOfMemoryError(
            'CUDA out of memory. Tried to allocate 2.00 GiB.\\nGPU 0 has 1.00 GiB free.'
        )

    def predict(self, inputs, samples):
        return torch.empty(1 << 60)
"""


@pytest.fixture(scope='module')
def greedy(run_tool, tmp_path_factory):
    """Run a tool with a detector that needs too much; return its status and last line."""
    folder = tmp_path_factory.mktemp('greedy')
    (folder / 'greedy.py').write_text(DETECTOR)
    config = folder / 'config.py'
    config.write_text(
        f'_base_ = {str(DEMOS["detection"])!r}\n'
        "custom_imports = dict(imports=['mmdense', 'greedy'])\n"
        "model = dict(type='Greedy')\n"
    )

    def run(tool, *arguments):
        status, output = run_tool(
            *(sys.executable, ROOT / 'tools' / tool, config, *arguments, '--work-dir', folder),
            *('--cfg-options', 'train_dataloader.num_workers=0'),
            PYTHONPATH=str(folder),
        )
        assert 'Traceback' not in output
        return status, output.splitlines()[-1].replace(str(config), 'CONFIG')

    return run


def test_training_suggests_how_to_need_less(greedy):
    status, line = greedy('train.py')
    assert status == 2
    assert line == (
        'error: out of memory with train_dataloader.batch_size=8 and images of up to 192 x 192. '
        'Try --cfg-options model.backbone.memory=lean, then train_dataloader.batch_size=4 with '
        '--auto-scale-lr, then --amp-dtype bfloat16, then what `python tools/plan_memory.py '
        'CONFIG` recommends, then smaller images. '
        '(OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB)'
    )


def test_testing_suggests_how_to_need_less(greedy, tmp_path):
    weights = {'backbone.stem.0.bias': torch.zeros(32)}
    torch.save(dict(state_dict=weights), tmp_path / 'part.pth')
    status, line = greedy('test.py', tmp_path / 'part.pth', '--min-loaded', '0')
    assert status == 2
    assert line.startswith(
        'error: out of memory with test_dataloader.batch_size=8. Try --cfg-options '
        'test_dataloader.batch_size=4, then smaller images. ('
    )
    assert "can't allocate memory" in line
    assert str(1 << 62) in line  # bytes
