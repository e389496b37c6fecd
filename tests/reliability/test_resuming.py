"""Trainings that are killed, stopped by SIGTERM or out of disk space, and resume."""

import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from faults import train
from mmengine.logging import HistoryBuffer

from mmdense.weights.files import read_checkpoint
from support import CONDENSED, DEMOS, ROOT

pytestmark = pytest.mark.slow

# Four iterations an epoch on small images, with random augmentation.
DETECTION = """
train_dataloader = dict(
    batch_size=2, num_workers=2, dataset=dict(indices=8, pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomChoiceResize', scales=[(64, 64), (96, 96)], keep_ratio=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs')]))
val_dataloader = dict(batch_size=2)
"""
EMA = "custom_hooks = [*_base_.custom_hooks, dict(type='EMAHook', update_buffers=True)]\n"
SEGMENTATION = """
train_dataloader = dict(batch_size=2, num_workers=2, dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')]))
val_dataloader = dict(dataset=dict(indices=2))
model = dict(data_preprocessor=dict(size=(64, 64)), backbone=dict(drop_path_rate=0.2))
default_hooks = dict(checkpoint=dict(interval=3, max_keep_ckpts=-1))
train_cfg = dict(max_iters=8, val_interval=3)
randomness = dict(seed=None)
"""


def write_config(file, base, text='', *hooks):
    """Write a config with more hooks than its base and ``text`` have."""
    lines = [f'_base_ = {str(base)!r}\n', text]
    if hooks:
        inherited = 'custom_hooks' if 'custom_hooks' in text else '_base_.custom_hooks'
        lines.append(f'custom_hooks = [*{inherited}, *{list(hooks)!r}]\n')
        lines.append("custom_imports = dict(imports=['mmdense', 'faults'])\n")
    file.write_text(''.join(lines))
    return file


def differences(one, other, where=''):
    """Return where two checkpoints differ, except for times and names."""
    if any(name in where for name in ('time', 'ckpt', '.cfg', 'experiment')):
        return []
    if isinstance(one, HistoryBuffer):
        one, other = list(one.data), list(other.data)
    if isinstance(one, dict):
        keys = {*one, *other}
        parts = [(k, one.get(k), other.get(k)) for k in sorted(keys, key=str)]
    elif isinstance(one, list | tuple) and len(one) == len(other):
        parts = [(i, *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    else:
        same = torch.equal if isinstance(one, torch.Tensor) else np.array_equal
        return [] if type(one) is type(other) and same(one, other) else [where]
    return [place for k, a, b in parts for place in differences(a, b, f'{where}.{k}')]


def test_differences_are_found():
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    one = dict(w=torch.ones(2), m=[dict(x=1)], h=history, time=1.0)
    assert differences(one, dict(one, time=2.0)) == []
    other = dict(w=torch.zeros(2), m=[dict(x=2)], h=HistoryBuffer([1.0, 3.0], [1, 1]), time=1.0)
    assert differences(one, other) == ['.h.0', '.m.0.x', '.w']


def last_checkpoint(work_dir):
    checkpoint = read_checkpoint((work_dir / 'last_checkpoint').read_text())
    del checkpoint['meta']['cfg']
    return checkpoint


def files(work_dir):
    return sorted(file.name for file in work_dir.glob('[!.]*.pth'))


@pytest.fixture(scope='module')
def interrupted(project):
    """Train one detector without and one with three interruptions; return all outputs."""
    runs, folder = {}, project / 'interrupted'
    iteration = random.Random(9).choice([5, 6, 7])  # of the second and last epoch
    faults = dict(
        whole=None,
        stopped=dict(type='SendSignal', number=signal.SIGTERM.value, at=2),
        validating=dict(type='SendSignal', number=signal.SIGTERM.value, at=4, validating=True),
        killed=dict(type='SendSignal', number=signal.SIGKILL.value, at=iteration),
        last=None,
    )
    for name, fault in faults.items():
        config = write_config(
            project / f'{name}.py', CONDENSED, DETECTION + EMA, *([fault] if fault else [])
        )
        work_dir = project / name if name == 'whole' else folder
        options = ['train_cfg.max_epochs=2', 'default_hooks.logger.interval=1']
        runs[name] = train(
            *(config, '--resume', '--work-dir', work_dir, '--cfg-options', *options),
            project=project,
        )
        if name != 'whole':
            runs[name] += (files(folder),)
    return runs, project / 'whole', folder


def test_a_killed_run_ends_like_an_uninterrupted_one(interrupted):
    runs, whole, folder = interrupted
    assert runs['whole'][0] == 0, runs['whole'][1]
    assert runs['killed'][0] == -signal.SIGKILL, runs['killed'][1]
    assert runs['last'][0] == 0, runs['last'][1]
    one, other = last_checkpoint(whole), last_checkpoint(folder)
    assert {'ema_state_dict', 'optimizer', 'param_schedulers', 'message_hub'} <= set(one)
    assert len(one['message_hub']['log_scalars']['train/loss'].data[0]) == 8
    masks = [v for k, v in one['state_dict'].items() if k.endswith('mask')]
    assert any(0 < mask.float().mean() < 1 for mask in masks)
    assert differences(one, other) == []


def test_sigterm_stops_between_two_iterations(interrupted):
    runs, _, folder = interrupted
    status, output, files_left = runs['stopped']
    assert status == 143, output
    *_, before, last = output.splitlines()
    assert '[1][3/4]' in before  # the iteration was finished
    assert 'SIGTERM: stopped after 3 of 8' in last
    assert f'--resume continues from {folder / "interrupted.pth"}' in last
    assert files_left == ['interrupted.pth']
    assert 'resumed epoch: 0, iter: 3' in runs['validating'][1]
    assert '[1][4/4]' in runs['validating'][1]


def test_sigterm_stops_a_validation_which_runs_again_on_resuming(interrupted):
    runs, _, folder = interrupted
    status, output, files_left = runs['validating']
    assert status == 143, output
    assert 'SIGTERM: stopped after 4 of 8' in output.splitlines()[-1]
    assert 'coco/bbox_mAP' not in output
    assert files_left == ['epoch_1.pth', 'interrupted.pth']
    assert 'resumed epoch: 1, iter: 4' in runs['killed'][1]
    assert 'Epoch(val) [1][2/2]' in runs['killed'][1]
    assert runs['last'][2] == ['epoch_1.pth', 'epoch_2.pth']


def test_training_by_iterations_without_a_seed_resumes_exactly(project):
    config = write_config(project / 'seg.py', DEMOS['segmentation'], SEGMENTATION)
    whole, rest = project / 'seg-whole', project / 'seg-rest'
    status, output = train(config, '--work-dir', whole, project=project)
    assert status == 0, output
    rest.mkdir()
    # As if killed before the validation, which mmengine would skip.
    shutil.copy(whole / 'iter_3.pth', rest)
    status, output = train(config, '--work-dir', rest, '--resume', project=project)
    assert status == 0, output
    assert 'resumed epoch: 0, iter: 3' in output
    assert output.count('Iter(val)') == 3  # after 3, 6 and 8
    one, other = last_checkpoint(whole), last_checkpoint(rest)
    assert one['meta']['seed'] == other['meta']['seed']
    assert len(one['message_hub']['log_scalars']['train/loss'].data[0]) == 8
    assert differences(one, other) == []


@pytest.fixture(scope='module')
def limited(project):
    """Train a detector whose second checkpoint meets three faults, one after another."""
    work_dir, runs = project / 'limited', {}
    size = 300_000  # more than logs, less than checkpoints
    faults = dict(
        killed=dict(type='LimitFiles', size=size, at=1, deadly=True),
        refused=dict(type='LimitFiles', size=size, at=1, deadly=False),
        damaged=None,
    )
    options = [
        'train_dataloader.dataset.indices=2',
        'train_cfg.max_epochs=2',
        'train_cfg.val_interval=9',
        'default_hooks.checkpoint.max_keep_ckpts=1',
    ]
    for name, fault in faults.items():
        if name == 'damaged':  # as after a power cut
            content = (work_dir / 'epoch_1.pth').read_bytes()
            (work_dir / 'epoch_2.pth').write_bytes(content[: len(content) // 2])
            (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_2.pth'))
        config = write_config(
            project / f'limited-{name}.py',
            DEMOS['detection'],
            DETECTION,
            *([fault] if fault else []),
        )
        status, output = train(
            *(config, '--resume', '--work-dir', work_dir, '--cfg-options', *options),
            project=project,
        )
        hidden = sorted(file.name for file in work_dir.glob('.*'))
        last = (work_dir / 'last_checkpoint').read_text()
        runs[name] = status, output, files(work_dir), hidden, last
    return work_dir, runs


def test_killed_while_a_checkpoint_is_written(limited):
    work_dir, runs = limited
    status, output, files_left, hidden, last = runs['killed']
    assert status == -signal.SIGXFSZ, output
    assert hidden == ['.epoch_2.pth.part']
    # The old one is still there, although only one is kept.
    assert files_left == ['epoch_1.pth']
    assert last == str(work_dir / 'epoch_1.pth')
    _, output, _, hidden, _ = runs['refused']
    assert 'resumed epoch: 1, iter: 1' in output
    assert hidden == []


def test_a_checkpoint_that_cannot_be_written(limited):
    work_dir, runs = limited
    status, output, files_left, hidden, _ = runs['refused']
    assert status == 2, output
    assert 'Traceback' not in output
    error = output.splitlines()[-1]
    assert error.startswith(f'error: cannot write {work_dir / "epoch_2.pth"}: File too large (')
    assert ' MB needed, ' in error
    assert f'last checkpoint: {work_dir / "epoch_1.pth"}. Free' in error
    assert files_left == ['epoch_1.pth']
    assert hidden == []


def test_a_damaged_checkpoint_is_not_resumed(limited):
    work_dir, runs = limited
    status, output, files_left, _, last = runs['damaged']
    assert status == 0, output
    assert f'{work_dir / "epoch_2.pth"} is damaged' in output
    assert f'resuming from {work_dir / "epoch_1.pth"}' in output
    assert files_left == ['epoch_2.pth']
    assert last == str(work_dir / 'epoch_2.pth')
    assert last_checkpoint(work_dir)['meta']['epoch'] == 2


def test_scalars_that_cannot_be_written(project):
    work_dir = project / 'full'
    work_dir.mkdir()
    (work_dir / 'full.json').symlink_to('/dev/full')
    options = [
        'train_dataloader.dataset.indices=2',
        'default_hooks.logger.interval=1',
        'visualizer.vis_backends.0.scalar_save_file=../../full.json',
    ]
    config = write_config(project / 'full.py', DEMOS['detection'], DETECTION)
    command = [config, '--work-dir', work_dir, '--cfg-options', *options]
    status, output = train(*command, project=project)
    assert status == 2, output
    assert 'Traceback' not in output
    error = output.splitlines()[-1]
    assert error.startswith(f'error: cannot write {work_dir}: No space left on device')
    assert 'last checkpoint: none yet' in error


def test_two_processes_stop_at_the_same_iteration(project):
    """torchrun forwards SIGTERM to all processes."""
    work_dir = project / 'two'
    config = write_config(project / 'two.py', DEMOS['detection'], DETECTION)
    log = project / 'two.txt'
    options = [
        'train_cfg.max_epochs=1000',
        'train_cfg.val_interval=1000',  # several processes would finish it
        'default_hooks.checkpoint.interval=1000',
        'default_hooks.logger.interval=1',
    ]
    with log.open('w') as opened:
        process = subprocess.Popen(
            [
                *(sys.executable, '-m', 'torch.distributed.run', '--standalone'),
                *('--nproc-per-node', '2', ROOT / 'tools/train.py', config),
                *('--launcher', 'pytorch', '--work-dir', work_dir, '--cfg-options', *options),
            ],
            cwd=project,
            stdout=opened,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 400
        while 'Epoch(train) [2]' not in ' '.join(log.read_text().split()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
    finally:
        process.terminate()  # torchrun ends its processes, if necessary by SIGKILL
        process.wait(120)
    lines = [line for line in log.read_text().splitlines() if 'SIGTERM: stopped after' in line]
    assert len(lines) == 1, log.read_text()
    checkpoint = read_checkpoint(work_dir / 'interrupted.pth')
    assert f'stopped after {checkpoint["meta"]["iter"]} of ' in lines[0]
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'interrupted.pth')
