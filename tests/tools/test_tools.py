"""The command lines, run as users run them."""

import json
import pickle
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import DEMOS, ROOT, TWO_ITERATIONS

TRAIN, TEST = ROOT / 'tools/train.py', ROOT / 'tools/test.py'
VISUALIZE = ROOT / 'tools/visualize.py'
PY = sys.executable
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module', params=DEMOS)
def task(request):
    return request.param


@pytest.fixture(scope='module')
def two_iterations(task, project, run_tool):
    """Train for two iterations with the options that every recipe may be tried with."""
    status, said = run_tool(
        PY, TRAIN, DEMOS[task], '--amp', '--auto-scale-lr', '--cfg-options', *TWO_ITERATIONS[task]
    )
    assert status == 0, said
    work_dir = project / 'work_dirs' / DEMOS[task].stem
    return said, work_dir, Path((work_dir / 'last_checkpoint').read_text())


def test_two_iterations_train_and_evaluate(task, two_iterations):
    said, work_dir, checkpoint = two_iterations
    assert checkpoint.is_file()
    assert said.count('float32 in place of mixed precision') == 1 or 'cuda' in said
    assert ('coco/bbox_mAP' if task == 'detection' else 'mIoU') in said
    records = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    assert 'loss' in json.loads(records[0])


def test_test_writes_predictions_and_pictures(task, two_iterations, run_tool, tmp_path):
    out = tmp_path / ('predictions.pkl' if task == 'detection' else 'maps')
    status, said = run_tool(
        PY, TEST, DEMOS[task], two_iterations[2], '--out', out, '--show-dir', tmp_path / 'shown'
    )
    assert status == 0, said
    table = said[said.index('metric') :]
    assert ('coco/bbox_mAP_50' if task == 'detection' else 'mIoU') in table
    assert list((tmp_path / 'shown').rglob('*.jpg')) or list((tmp_path / 'shown').rglob('*.png'))
    if task == 'detection':
        predictions = pickle.loads(out.read_bytes())
        assert len(predictions) == 4
        assert predictions[0]['pred_instances']['bboxes'].shape[1] == 4
    else:
        assert len(list(out.glob('*.png'))) == 4


def test_test_time_augmentation(task, two_iterations, run_tool):
    status, said = run_tool(PY, TEST, DEMOS[task], two_iterations[2], '--tta')
    if task == 'segmentation':
        assert status == 0, said
        assert 'mIoU' in said[said.index('metric') :]
    else:
        assert status == 2
        assert 'has no tta_model' in said.splitlines()[-1]


def test_visualize_draws_predictions_and_curves(task, two_iterations, run_tool, tmp_path):
    status, said = run_tool(
        PY, VISUALIZE, DEMOS[task], two_iterations[2], '--out', tmp_path, '--num', 3
    )
    assert status == 0, said
    assert 'last validation' in said
    for name in ('predictions.png', 'curves.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
        assert name in said.splitlines()[-1]


def test_resume_goes_on(task, two_iterations, run_tool, project):
    work_dir = project / f'resumed-{task}'
    shutil.copytree(two_iterations[1], work_dir)
    name = two_iterations[2].name
    (work_dir / 'last_checkpoint').write_text(str(work_dir / name))
    more = ['train_cfg.max_epochs=2'] if task == 'detection' else ['train_cfg.max_iters=4']
    rest = [o for o in TWO_ITERATIONS[task] if 'max_' not in o]
    status, said = run_tool(
        PY, TRAIN, DEMOS[task], '--work-dir', work_dir, '--resume', '--cfg-options', *more, *rest
    )
    assert status == 0, said
    assert f'Load checkpoint from {work_dir / name}' in said
    assert ('epoch: 1, iter: 2' if task == 'detection' else 'iter: 2') in said
    assert (work_dir / ('epoch_2.pth' if task == 'detection' else 'iter_4.pth')).is_file()


def test_stock_tool_trains_our_config(task, run_tool, project):
    package = dict(detection='mmdet', segmentation='mmseg')[task]
    stock = Path(find_spec(package).origin).parent / '.mim/tools/train.py'
    work_dir = project / f'stock-{task}'
    status, said = run_tool(
        PY, stock, DEMOS[task], '--work-dir', work_dir, '--cfg-options', *TWO_ITERATIONS[task]
    )
    assert status == 0, said
    assert ('coco/bbox_mAP' if task == 'detection' else 'mIoU') in said
    # mmdet's test.py imports mmcv.ops before it reads the config.
    stock_test = ['-m', 'mmdense', stock.with_name('test.py')]
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    status, said = run_tool(PY, *stock_test, DEMOS[task], checkpoint, '--work-dir', work_dir)
    assert status == 0, said


def test_two_processes(run_tool, project, tmp_path):
    """On a machine without GPUs the processes talk through gloo."""
    env = dict(PORT='29517', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    status, said = run_tool(
        ROOT / 'tools/dist_train.sh',
        DEMOS['detection'],
        2,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *TWO_ITERATIONS['detection'],
        'train_dataloader.batch_size=4',
        **env,
    )
    assert status == 0, said
    assert 'Distributed training: True' in said
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    status, said = run_tool(
        ROOT / 'tools/dist_test.sh',
        DEMOS['detection'],
        checkpoint,
        2,
        '--work-dir',
        tmp_path,
        **env,
    )
    assert status == 0, said
    assert said.count('coco/bbox_mAP_75 ') == 1  # one table, from one process


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_scripts_say_how_they_are_used(run_tool, script):
    status, said = run_tool(ROOT / 'tools' / script)
    assert status == 2
    assert f'tools/{script}' in said


def test_slurm_script_hands_everything_on(run_tool, tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nfor word; do echo "[$word]"; done\n')
    srun.chmod(0o755)
    env = dict(PATH=f'{tmp_path}:/usr/bin:/bin', GPUS='16', SRUN_ARGS='--qos high')
    status, said = run_tool(
        ROOT / 'tools/slurm_train.sh', 'gpu', 'a job', 'c.py', 'w', '--amp', **env
    )
    assert status == 0, said
    words = said.split('\n')
    assert words[:4] == ['[--partition]', '[gpu]', '[--job-name]', '[a job]']
    assert words[words.index('[--ntasks]') + 1] == '[16]'
    assert words[words.index('[--qos]') + 1] == '[high]'
    assert words[-7:-1] == ['[c.py]', '[--work-dir]', '[w]', '[--launcher]', '[slurm]', '[--amp]']


def test_a_mistake_is_one_line(run_tool, tmp_path):
    status, said = run_tool(
        PY,
        TRAIN,
        ROOT / 'configs/detection/rdnet/faster-rcnn_rdnet-t_fpn_1x_coco.py',
        '--work-dir',
        tmp_path,
    )
    assert status == 2
    errors = [line for line in said.splitlines() if line.startswith('error: ')]
    assert errors == [
        'error: data/coco/annotations/instances_train2017.json not found (wanted by '
        'train_dataloader.dataset): if the data are elsewhere, add --cfg-options data_root=FOLDER'
    ]
    assert 'Traceback' not in said
