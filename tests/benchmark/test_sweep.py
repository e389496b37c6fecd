"""Sweeps: lengths of schedules, runs that continue, fail or are killed, and complete ones."""

import csv
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from mmdense.benchmark.backbones import find_backbone
from mmdense.benchmark.memory import build_training
from mmdense.benchmark.robustness import corrupted_tests
from mmdense.benchmark.sweep import MEASURED, Sweep
from mmdense.config.channels import build_part, put_backbone
from mmdense.config.read import load_config
from mmdense.errors import UserError
from mmdense.flops import model_costs
from support import CONDENSED, DEMOS, ROOT, load_tool, write_log

TOOL = ROOT / 'tools/benchmark.py'
NAMES = [str(DEMOS['detection']), 'timm:resnet18']
# Instead of training: logs one epoch; the first of rdnet-nano's two starts fails. The first start
# of the seed KILLED takes its job with it.
STAND_IN = """
import json, os, pathlib, re, signal, sys
config, checkpoint = pathlib.Path(sys.argv[1]), sys.argv[2]
folder = config.parents[1] / 'runs' / config.stem
starts = folder / 'starts'
starts.write_text(starts.read_text() + '.' if starts.exists() else '.')
if checkpoint != '--resume':
    metrics = {'coco/bbox_mAP': len(checkpoint), 'coco/bbox_mAP_l': -1.0, 'time': 1.0}
    (folder / '1').mkdir()
    sys.exit((folder / '1/1.json').write_text(json.dumps(metrics)) < 0)
print('Epoch(train)  [1][10/40]  lr: 1e-3  eta: 0:01:20  time: 0.1  loss: 1.0', flush=True)
if folder.name == 'rdnet-nano' and len(starts.read_text()) == 1:
    print('Traceback (most recent call last):')
    sys.exit('torch.OutOfMemoryError: out of memory')
seed = int(re.search('randomness = dict.*?seed=(\\\\d+)', config.read_text())[1])
if str(seed) == os.environ.get('KILLED') and len(starts.read_text()) == 1:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()
logs = folder / '1/vis_data'
logs.mkdir(parents=True)
records = [dict(loss=2.0, step=1), {'coco/bbox_mAP': 0.25 + seed, 'step': 1}]
(logs / 'scalars.json').write_text('\\n'.join(map(json.dumps, records)))
"""


@pytest.fixture
def stand_in(tmp_path):
    file = tmp_path / 'stand_in.py'
    file.write_text(STAND_IN)
    return [sys.executable, str(file)]


def specs_of(names, pretrained=False):
    return [find_backbone(name, pretrained=pretrained) for name in names]


def sweep_of(
    folder, names=NAMES, *, config=DEMOS['detection'], options=None, pretrained=False, **more
):
    specs = names if not isinstance(names[0], str) else specs_of(names, pretrained)
    cfg = load_config(str(config), options=options)
    return Sweep(cfg, specs, folder, command='sweep', pretrained=pretrained, **more)


def results_of(folder):
    return {
        row['backbone']: row for row in json.loads((folder / 'results.json').read_text())['rows']
    }


def test_a_failed_run_is_a_row_and_is_tried_again(tmp_path, stand_in):
    folder = tmp_path / 'sweep'
    updates = []
    sweep = sweep_of(folder)
    sweep.train(stand_in, lambda *update: updates.append(update))
    assert [sweep.state(b.name)['status'] for b in sweep.backbones] == ['failed', 'done']
    assert updates[-1] == ('timm:resnet18', 'done', 1)
    log = sweep.runs['timm:resnet18'][0].log
    text = 'Epoch(val) [1][4/4]    coco/bbox_mAP: 0.5  coco/bbox_mAP_50: 0.6  time: 1\n'
    log.write_text(text + log.read_text())
    state = 'epoch 1 of 8, 0:01:20 left, loss 1.0, bbox_mAP 0.5'
    assert sweep.runs['timm:resnet18'][0].read_progress() == (state, 0.25 / 8)
    rows = results_of(folder)
    assert rows['rdnet-nano']['error'] == 'torch.OutOfMemoryError: out of memory'
    assert rows['rdnet-nano']['metrics'] == {}
    assert rows['timm:resnet18']['metrics'] == {'box AP': 0.25}
    assert rows['timm:resnet18']['losses'] == [[1, 2.0]]
    assert 'out of memory' in (folder / 'report.html').read_text()
    seconds = sweep.state('rdnet-nano')['seconds']
    again = sweep_of(folder)
    again.train(stand_in)
    assert [again.state(b.name)['status'] for b in again.backbones] == ['done', 'done']
    assert again.state('rdnet-nano')['seconds'] > seconds
    assert (folder / 'runs/rdnet-nano/starts').read_text() == '..'
    assert (folder / 'runs/timm-resnet18/starts').read_text() == '.'  # it was finished


def test_seeds(tmp_path, stand_in):
    options = {'randomness.seed': 2}
    sweep_of(tmp_path, NAMES[1:], options=options).train(stand_in)
    names = []
    sweep = sweep_of(
        tmp_path, NAMES[1:], seeds=3, options=options
    )  # the first seed is trained already
    sweep.train(stand_in, lambda name, *_: names.append(name))
    assert [*dict.fromkeys(names)] == [f'timm:resnet18, seed {seed}' for seed in (2, 3, 4)]
    assert [(tmp_path / f'runs/timm-resnet18{s}/starts').read_text() for s in ('', '.seed3')] == [
        '.',
        '.',
    ]
    row = results_of(tmp_path)['timm:resnet18']
    assert [seed['metrics']['box AP'] for seed in row['seeds']] == [2.25, 3.25, 4.25]
    assert (row['metrics'], row['deviations']) == ({'box AP': 3.25}, {'box AP': 1.0})
    assert '3.25 ± 1.00' in (tmp_path / 'report.md').read_text()
    assert load_config(str(tmp_path / 'configs/timm-resnet18.seed4.py')).randomness.seed == 4


def test_a_checkpoint_is_tested(tmp_path, stand_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pth').touch()
    names = [NAMES[1], f'{NAMES[1]}@a.pth', f'{NAMES[1]}@b.pth']
    for _ in range(2):
        sweep = sweep_of(tmp_path / 'x', names, seeds=2)
        sweep.try_out()
        sweep.train(stand_in)
    cfg = sweep.configs[names[1]]
    assert cfg.test_evaluator == cfg.val_evaluator
    trained, tested, missing = results_of(tmp_path / 'x').values()
    assert (trained['source'], tested['source'], missing['error']) == (
        None,
        'a.pth',
        'no checkpoint b.pth',
    )
    assert (tested['metrics'], tested['deviations']) == ({'box AP': len('a.pth')}, {})
    assert (len(trained['seeds']), len(tested['seeds'])) == (2, 1)
    assert (tmp_path / 'x/runs/timm-resnet18-a.pth/starts').read_text() == '.'
    assert f'{names[1]} (not trained here: a.pth)' in (tmp_path / 'x/report.md').read_text()
    os.utime('a.pth', (1, 1))
    with pytest.raises(UserError, match='belongs to a sweep with other settings'):
        sweep_of(tmp_path / 'x', names)


def test_corrupted_images(tmp_path, stand_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pth').touch()
    name = f'{NAMES[1]}@a.pth'
    for _ in range(2):
        sweep = sweep_of(tmp_path / 'x', [name], corruptions=['fog', 'snow'], severities=[3])
        sweep.train(stand_in)
        sweep.test_corrupted(stand_in, lambda *_: None)
    (row,) = results_of(tmp_path / 'x').values()
    assert row['metrics'] == {'box AP': 5, 'mPC': 5, 'rPC (%)': 100}
    assert 'mPC' in (tmp_path / 'x/report.md').read_text()
    for kind in ('fog', 'snow'):
        config = load_config(str(tmp_path / f'x/configs/timm-resnet18-a.pth.{kind}-3.py'))
        pipeline = config.test_dataloader.dataset.pipeline
        assert [step['type'] for step in pipeline][:2] == ['LoadImageFromFile', 'mmdense.Corrupt']
        assert pipeline[1].corruption == kind
        assert (tmp_path / f'x/runs/timm-resnet18-a.pth.{kind}-3/starts').read_text() == '.'
    failed = corrupted_tests(sweep.runs[name][0], sweep.all_corruptions)[0]
    failed.save_state('failed', 1.0, error='fog is missing')
    sweep.report()
    (row,) = results_of(tmp_path / 'x').values()
    assert (row['metrics'], row['error']) == ({'box AP': 5}, 'fog 3: fog is missing')
    with pytest.raises(UserError, match="no corruption 'fig'; did you mean 'fog'"):
        sweep_of(tmp_path / 'x', [name], corruptions=['fig'])


# Commands of SLURM: an array's jobs run at once, on this machine.
SLURM = dict(
    sbatch=f"""#!{sys.executable}
import os, pathlib, re, subprocess, sys
quiet = subprocess.DEVNULL
text = pathlib.Path(sys.argv[1]).read_text()
pathlib.Path(__file__).with_name('script').write_text(text)
for i in range(1 + int(re.search(r'--array=0-(\\d+)', text)[1])):
    ids = dict(JOB_ID=8 + i, ARRAY_JOB_ID=7, ARRAY_TASK_ID=i, NTASKS=1, NNODES=1)
    ids |= dict(NODEID=0, PROCID=0, LOCALID=0, JOB_NODELIST='here')
    env = os.environ | {{f'SLURM_{{k}}': str(v) for k, v in ids.items()}}
    subprocess.Popen(['bash', '-c', text], env=env, stdout=quiet, stderr=quiet)
print('Submitted batch job 7')
""",
    srun='#!/bin/bash\nshift 5; "$@"',  # --unbuffered --output FILE --error FILE
    sacct='#!/bin/bash\necho "JobID|State|NodeList"',
)


needs_submitit = pytest.mark.skipif(not find_spec('submitit'), reason='submitit is missing')


@needs_submitit
@pytest.mark.slow
def test_a_job_array_of_slurm(tmp_path, stand_in, monkeypatch):
    commands = tmp_path / 'bin'
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv('PATH', str(commands), prepend=':')
    sweep = sweep_of(tmp_path / 'sweep', NAMES[1:], seeds=2)
    options = dict(slurm_partition='gpu', mem_gb=64)
    sweep.train(stand_in, jobs=dict(cluster='slurm', parallel=1, options=options))
    row = results_of(tmp_path / 'sweep')['timm:resnet18']
    assert [seed['metrics'] for seed in row['seeds']] == [{'box AP': 0.25}, {'box AP': 1.25}]
    script = (commands / 'script').read_text()
    (commands / 'sbatch').write_text('#!/bin/bash\necho "invalid partition" >&2; exit 1')
    with pytest.raises(UserError, match='submitit: .*invalid partition'):
        sweep_of(tmp_path / 'x', NAMES[1:]).train(stand_in, jobs=dict(cluster='slurm'))
    for option in ('array=0-1%1', 'partition=gpu', 'mem=64GB', 'time=1440', 'gpus-per-node=1'):
        assert f'#SBATCH --{option}\n' in script


@needs_submitit
@pytest.mark.slow
def test_jobs_give_the_same_rows_and_survive_a_killed_one(tmp_path, stand_in, monkeypatch):
    rows = []
    for folder, jobs in ((tmp_path / 'a', None), (tmp_path / 'b', dict(parallel=2))):
        sweep = sweep_of(folder, seeds=2)
        sweep.train(stand_in, jobs=jobs)
        sweep_of(folder, seeds=2).train(stand_in, jobs=jobs)  # what failed is tried again
        monkeypatch.setenv('KILLED', '1')
        rows.append(results_of(folder))
        for row in rows[-1].values():
            assert [run.pop('seconds') > 0 for run in (row, *row['seeds'])] == [True] * 3
            assert row['status'] == 'done'
    assert rows[0] == rows[1]
    starts = {file.parent.name: file.read_text() for file in tmp_path.glob('b/runs/*/starts')}
    assert starts == {
        'rdnet-nano': '..',  # failed
        'rdnet-nano.seed1': '..',  # killed with its job
        'timm-resnet18': '.',
        'timm-resnet18.seed1': '..',
    }


@needs_submitit
def test_jobs_that_cannot_run(tmp_path, stand_in, monkeypatch):
    for name in [name for name in sys.modules if name.split('.')[0] == 'submitit']:
        monkeypatch.delitem(sys.modules, name)
    log = logging.FileHandler(tmp_path / 'log', 'w')
    sweep = sweep_of(tmp_path, NAMES[1:])
    for jobs, message in (
        (dict(cluster='slurm'), 'submitit: .*[Ss]lurm'),
        (dict(options=dict(speed='high')), 'submitit: .*speed'),
    ):
        with pytest.raises(UserError, match=message):
            sweep.train(stand_in, jobs=jobs)
    assert log.stream, 'importing submitit does not close the log files of others'
    log.close()
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(UserError, match='pip install submitit'):
        sweep.train(stand_in, jobs={})


@pytest.mark.parametrize(
    ('best', 'metrics'),
    [({}, ['voc/AP50', 'voc/mAP']), (dict(save_best='voc/mAP'), ['voc/mAP', 'voc/AP50'])],
)
def test_any_metric_and_the_data_of_the_training(best, metrics, tmp_path):
    options = {f'default_hooks.checkpoint.{key}': value for key, value in best.items()}
    options['train_dataloader.dataset.data_root'] = 'data/trees/'
    sweep = sweep_of(tmp_path, NAMES[1:], options=options)
    odd = dict(table=[[1.0]], note='x', time=1.0, step=1)
    records = [dict(loss=1.0, step=1), {'voc/AP50': 0.3, 'voc/mAP': 0.2} | odd]
    write_log(tmp_path / 'runs/timm-resnet18', records)
    state = json.dumps(dict(status='done', seconds=1))
    (tmp_path / 'runs/timm-resnet18/state.json').write_text(state)
    sweep.report()
    results = json.loads((tmp_path / 'results.json').read_text())
    assert (results['metrics'], results['data']) == (metrics, 'data/trees')
    assert results['rows'][0]['metrics'] == {'voc/AP50': 0.3, 'voc/mAP': 0.2}


def test_the_config_is_relative_to_the_working_folder(tmp_path, monkeypatch):
    sweep = sweep_of(tmp_path / 'sweep', names=NAMES[1:])
    config = DEMOS['detection']
    for folder, path in ((ROOT, config.relative_to(ROOT)), (tmp_path, config)):
        monkeypatch.chdir(folder)
        sweep.report()
        assert json.loads((tmp_path / 'sweep/results.json').read_text())['config'] == str(path)


def test_other_settings_need_another_folder(tmp_path):
    sweep_of(tmp_path, names=NAMES[1:])
    sweep_of(tmp_path, names=[*NAMES[1:], str(CONDENSED)])  # a further backbone does not
    run = tmp_path / 'runs/timm-resnet18'
    (run / 'last_checkpoint').write_text('epoch_1.pth')
    message = r'timm-resnet18.py belongs to a sweep with other settings: .*--out'
    for options in (dict(gpus=2), dict(options={'train_cfg.max_epochs': 9})):
        with pytest.raises(UserError, match=message):
            sweep_of(tmp_path, names=NAMES[1:], **options)
    # A run that failed, or has not trained yet, begins again; its files are kept.
    (run / 'state.json').write_text(json.dumps(dict(status='failed', seconds=1, error='NaN')))
    for epochs in (9, 10):
        sweep = sweep_of(tmp_path, NAMES[1:], options={'train_cfg.max_epochs': epochs})
        assert (
            load_config(str(tmp_path / 'configs/timm-resnet18.py')).train_cfg.max_epochs == epochs
        )
    assert sweep.state('timm:resnet18')['status'] == 'waiting'
    assert (tmp_path / 'runs/timm-resnet18.failed1/last_checkpoint').exists()


def test_configs(tmp_path):
    """They are complete, and only CondenseNetV2 is pruned."""
    sweep_of(tmp_path, names=[*NAMES, str(CONDENSED)], config=CONDENSED)
    cfgs = {file.stem: load_config(str(file)) for file in tmp_path.glob('configs/*.py')}
    assert cfgs.keys() == {'rdnet-nano', 'timm-resnet18', 'condensenetv2-nano'}
    assert cfgs['timm-resnet18'].model.neck.in_channels == [64, 128, 256]
    assert cfgs['timm-resnet18'].work_dir == str(tmp_path / 'runs/timm-resnet18')
    hooks = {name: [hook['type'] for hook in cfg.custom_hooks] for name, cfg in cfgs.items()}
    assert hooks['timm-resnet18'] == hooks['rdnet-nano'] == ['mmdense.ChannelsLastHook']
    assert hooks['condensenetv2-nano'] == [*hooks['rdnet-nano'], 'mmdense.CondenseScheduleHook']


def test_settings_of_a_row(tmp_path):
    settings = [
        {'options': {'optim_wrapper.optimizer.lr': 0.5}, 'epochs': 3},
        {},
        {'options': {'optim_wraper.optimizer.lr': 0.5}},
        {'iters': 3},
    ]
    specs = [
        replace(find_backbone(NAMES[1], pretrained=False), name=f'net-{i}', settings=values)
        for i, values in enumerate(settings)
    ]
    sweep = sweep_of(tmp_path, specs)
    changed, plain = (sweep.configs[f'net-{i}'] for i in range(2))
    assert (changed.optim_wrapper.optimizer.lr, changed.train_cfg.max_epochs) == (0.5, 3)
    assert plain.optim_wrapper.optimizer == sweep.cfg.optim_wrapper.optimizer
    assert [sweep.runs[f'net-{i}'][0].epochs for i in range(2)] == [
        3,
        sweep.cfg.train_cfg.max_epochs,
    ]
    assert 'optim_wraper' in sweep.errors['net-2']
    assert 'counts epochs: give --epochs' in sweep.errors['net-3']
    sweep.report()
    assert results_of(tmp_path)['net-0']['settings'] == settings[0]


def test_frozen_backbones_have_weights(tmp_path):
    specs = specs_of(NAMES[1:], pretrained=True) + specs_of(NAMES[:1])
    sweep = sweep_of(tmp_path, specs, pretrained=True, frozen=True)
    assert sweep.configs[NAMES[1]].model.backbone.frozen_stages == 4
    assert sweep.errors == {
        'rdnet-nano': 'rdnet-nano starts from random weights: it cannot be --frozen'
    }
    sweep.report()
    assert 'from pretrained weights, frozen.' in (tmp_path / 'report.md').read_text()
    assert json.loads((tmp_path / 'results.json').read_text())['frozen']


def test_learning_rates_for_rdnet_are_refused_for_others(tmp_path):
    recipe = ROOT / 'configs/detection/rdnet/mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco.py'
    sweep = sweep_of(tmp_path, names=['rdnet-t', 'rexnet-1.0'], config=recipe)
    assert 'not for rexnet-1.0: add --cfg-options' in sweep.errors.pop('rexnet-1.0')
    assert not sweep.errors


def test_what_cannot_be_trained_is_a_row_with_its_error(tmp_path, stand_in):
    """Other strides, no such argument, weights that are missing, a step that fails."""
    bad, odd = 'timm:resnet18?bad=1', 'timm:resnet18?output_stride=8'
    sweep = sweep_of(tmp_path, names=[*NAMES, odd, bad, 'timm:test_resnet'])
    sweep.configs[NAMES[1]].model.rpn_head.in_channels = 7
    weights = dict(type='Pretrained', checkpoint='no.pth')
    sweep.configs['timm:test_resnet'].model.backbone.init_cfg = weights
    tried, states = [], {}
    sweep.try_out(progress=tried.append)
    assert tried == ['rdnet-nano', NAMES[1], 'timm:test_resnet']
    sweep.train(stand_in, lambda name, state, share: states.update({name: state}))
    rows = results_of(tmp_path)
    for name, error in {
        NAMES[1]: 'cannot be trained: RuntimeError: ',
        odd: 'reads feature maps at strides 4, 8, 16, but mmdense.TimmBackbone has them at 4, 8',
        bad: "unexpected keyword argument 'bad'",
        'timm:test_resnet': 'no.pth',
    }.items():
        assert rows[name]['status'] == 'failed'
        assert error in rows[name]['error']
        assert states[name] == rows[name]['error']
    assert (tmp_path / 'runs/rdnet-nano/starts').read_text() == '.', 'the only one that trained'
    assert not (tmp_path / 'runs/timm-test_resnet/starts').exists()


def test_timm_networks_get_the_pixels_that_they_were_trained_on(tmp_path):
    networks = ('timm:tf_efficientnetv2_s.in1k', 'timm:resnet18')
    sweep = sweep_of(tmp_path, names=networks, pretrained=True)
    means = [sweep.configs[name].model.data_preprocessor.mean for name in networks]
    assert means == [[127.5] * 3, pytest.approx([123.675, 116.28, 103.53])]


def test_a_running_training_is_not_started_twice(tmp_path, stand_in):
    """A training inherits the lock and keeps it when its sweep is gone."""
    folder = tmp_path / 'sweep'
    sweep = sweep_of(folder, names=NAMES[1:])
    sleeper = [sys.executable, '-c', 'import time; time.sleep(60)']
    with (folder / 'runs/timm-resnet18/lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orphan = subprocess.Popen(sleeper, pass_fds=[lock.fileno()])
    try:
        with pytest.raises(UserError, match='timm-resnet18 is still running'):
            sweep.train(stand_in)
    finally:
        orphan.kill()
        orphan.wait()
    sweep.train(stand_in)
    assert sweep.state('timm:resnet18')['status'] == 'done'


@pytest.mark.parametrize(
    ('log', 'end', 'message'),
    [
        ('error: no such file', 'sys.exit(2)', 'no such file'),
        ('[rank1]: Traceback\n[rank1]: ValueError: 7 of 9\na.b.ChildFailedError:', '', '7 of 9'),
        ('Traceback\ntorch.OutOfMemoryError: 9 GB\n  [hint]', '', 'OutOfMemoryError: 9 GB'),
        ('Killed', 'os.kill(os.getpid(), 9)', 'killed by signal 9'),
        ('', 'sys.exit(3)', 'ended with status 3'),
    ],
)
def test_why_a_training_failed(tmp_path, log, end, message):
    code = f'import os, sys; print({log!r}, flush=True); {end or "sys.exit(1)"}'
    sweep = sweep_of(tmp_path, names=NAMES[1:])
    sweep.train([sys.executable, '-c', code])
    assert message in sweep.state('timm:resnet18')['error']


def test_progress_in_lines_without_a_terminal(monkeypatch, capsys):
    seconds = iter((0, 10, 59, 60, 61, 61, 62, 62, 63))
    monkeypatch.setattr(time, 'monotonic', lambda: next(seconds))
    lines = load_tool('benchmark').Lines(Console(width=20))
    for step in range(4):
        lines.show('a', f'epoch {step} of 4')
    for _ in range(2):  # two trainings at a time
        lines.show('b', 'starting')
        lines.show('a', 'epoch 3 of 4')
    lines.show('b', 'no file [x] in a long folder')
    text = 'a: epoch 0 of 4\na: epoch 3 of 4\nb: starting\nb: no file [x] in a long folder\n'
    assert capsys.readouterr().out == text


def test_progress_as_a_table():
    console = Console(width=100, height=7, record=True)
    board = load_tool('benchmark').Board(console, 'abcd')
    for name, state, share in (
        ('b', 'epoch 1 of 8, 1 day, 0:01:20 left, loss 1.25, bbox_mAP 0.5', 0.25),
        ('c', 'epoch 8 of 8, 0:00:00 left, loss 0.75', 1.0),
        ('c', 'done', 1.0),
        ('d', 'RuntimeError: [x], y', 0.0),
    ):
        board.show(name, state, share)
    console.print(board)
    lines = [' '.join(line.replace('━', '').split()) for line in console.export_text().splitlines()]
    assert lines == [
        '1 of 4 trainings done',
        'training state left loss accuracy',
        'b epoch 1 of 8 1 day, 0:01:20 1.25 bbox_mAP 0.5',
        'd RuntimeError: [x], y',
        'c done 0.75',
    ], 'those that run come first, and as many as fit'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--backbones', 'rdnet-q'], "unknown backbone 'rdnet-q'; did you mean 'rdnet-"),
        ([], 'name --backbones, or a file of --rows'),
        (['--backbones', 'rdnet-t', 'rdnet-t'], 'two backbones have the same name: rdnet-t, rdnet'),
        (['--backbones', 'rdnet-t', '--config', 'configs/x.py'], 'no config configs/x.py'),
        (['--backbones', 'rdnet-t', '--out', '/proc/nowhere'], 'cannot write /proc/nowhere'),
    ],
)
def test_errors_are_one_line(call_tool, arguments, message):
    status, _, output = call_tool('benchmark', 'sweep', *arguments)
    assert status == 2
    assert output.splitlines()[-1].startswith(f'error: {message}')


@pytest.mark.slow
@pytest.mark.parametrize('task', DEMOS)
def test_a_killed_sweep_continues(project, run_tool, task):
    """Two narrow networks on a few images; the training of the first one is killed."""
    folder = project / f'sweep-{task}'
    length = dict(detection=['--epochs', '2'], segmentation=['--iters', '4'])[task]
    command = [sys.executable, TOOL, 'sweep', '--config', DEMOS[task], '--out', folder, *length]
    command += ['--backbones', CONDENSED, 'timm:test_resnet', '--rounds', '2', '--pictures', '2']
    command += ['--device', 'cpu', '--batch', '2', '--precision', 'bf16', '--onnx']
    with subprocess.Popen(
        [*map(str, command)], cwd=project, stdout=subprocess.DEVNULL, start_new_session=True
    ) as first:
        checkpoint = folder / 'runs/condensenetv2-nano/last_checkpoint'
        end = time.monotonic() + 300
        while not checkpoint.exists() and first.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
    status, output = run_tool(*command)
    assert status == 0, output
    assert output.splitlines()[-1] == f'report: {folder}/report.html'
    assert 'timm:test_resnet: starting\n' in output
    assert 'timm:test_resnet: done\n' in output
    assert 'measuring: inference, deployed: ' in output
    assert len(output.splitlines()) < 30
    rows = results_of(folder)
    assert [*rows] == ['condensenetv2-nano', 'timm:test_resnet']
    for row in rows.values():
        assert row['status'] == 'done'
        assert row['error'] is None
        assert row['metrics']
        exported = row['infer'].pop('onnx')
        assert min(exported['p50'], exported['throughput']) > 0
        assert (exported['precision'], exported['memory']) == ('fp32', None)
        assert {*row['infer']} == {'deployed', 'trained'}
        for figures in row['infer'].values():
            assert figures['p50'] > 0
            assert figures['throughput'] != 1 / figures['p50']
            recorded = [figures[key] for key in ('batch', 'precision', 'memory_format')]
            assert recorded == [2, 'bf16', 'channels_last']
            assert row['train']['memory'] > figures['memory'] > 0
        assert [(folder / picture).stat().st_size > 0 for picture in row['pictures']] == [True] * 2
    learned = load_config(str(folder / 'configs/condensenetv2-nano.py'))
    parts = rows['condensenetv2-nano']['parts']
    dense = build_part(learned.model, learned.default_scope).eval()
    assert parts['backbone']['macs'] < 0.6 * model_costs(dense, (192, 192))['backbone'].macs
    with (folder / 'results.csv').open() as file:
        assert [row['backbone'] for row in csv.DictReader(file)] == [*rows]
    log = (folder / 'runs/condensenetv2-nano/output.log').read_text()
    assert 'resumed' in log or 'Auto resumed' in log
    stamp = (folder / MEASURED).stat().st_mtime_ns
    assert run_tool(*command)[0] == 0
    assert (folder / MEASURED).stat().st_mtime_ns == stamp, 'nothing is measured twice'


@pytest.mark.slow
def test_a_checkpoint_compiled_for_inference(project, run_tool):
    """It is tested, then measured: a sweep without training."""
    cfg = load_config(str(DEMOS['detection']))
    put_backbone(cfg, find_backbone('timm:test_vit', pretrained=False).config)
    model = build_training(cfg, 'cpu')[0]
    torch.save(dict(state_dict=model.state_dict()), project / 'vit.pth')
    command = [
        sys.executable,
        TOOL,
        'sweep',
        '--backbones',
        'timm:test_vit@vit.pth',
        'published:rdnet-t',
    ]
    command += ['--seeds', 2, '--out', 'checkpoint', '--compile', '--form', 'trained']
    command += ['--rounds', 2, '--batch', 2, '--pictures', 1, '--device', 'cpu']
    command += ['--corruptions', 'gaussian_noise', '--severities', 5]
    status, output = run_tool(*command, TORCH_LOGS='dynamo')
    assert status == 0, output
    assert 'calling compiler function inductor' in output
    (row,) = results_of(project / 'checkpoint').values()
    assert (row['error'], row['source']) == (None, 'vit.pth')
    assert 0 <= row['metrics']['box AP'] < 1
    assert 0 <= row['metrics']['mPC'] < 1
    assert row['infer']['trained']['compiled']
    assert row['infer']['trained']['p50'] > 0
    assert (project / 'checkpoint/results.tex').read_text().count('(published)') == 2
