"""A diverging training in two processes."""

import re

import pytest

from support import DEMOS, ROOT

pytestmark = pytest.mark.slow

RATE, SIDE = 1e34, 96  # after one step, sums of weights are infinite


def test_two_processes_stop_and_name_the_images(run_tool, tmp_path):
    status, output = run_tool(
        *(ROOT / 'tools/dist_train.sh', DEMOS['segmentation'], 2, '--work-dir', tmp_path),
        '--cfg-options',
        f'optim_wrapper.optimizer.lr={RATE}',
        'default_hooks.nan_guard.patience=3',
        'default_hooks.checkpoint.interval=100',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0',
        f'train_dataloader.dataset.pipeline.2.scale=({SIDE},{SIDE})',
        f'model.data_preprocessor.size=({SIDE},{SIDE})',
        CUDA_VISIBLE_DEVICES='',
        OMP_NUM_THREADS='1',
    )
    assert status not in (0, 2), output  # of torchrun
    lines = [line for line in output.splitlines() if line.startswith('error: ')]
    assert len(lines) == 2, output
    assert lines[0] == lines[1]
    assert 'no finite loss since iteration 2 of 400 (loss nan' in lines[0]
    assert 'at iteration 3 the weights are not finite either' in lines[0]
    assert float(re.search('learning rate ([^,]+),', lines[0])[1]) > RATE / 100
    assert len({*re.findall(r'data/digits/train/\d+\.jpg', lines[0])}) == 4  # two from each process
    assert lines[0].endswith('last checkpoint: none yet')
    assert not list(tmp_path.glob('*.pth'))
    assert 'Connection closed' not in output  # no process waited for one that had exited
