"""tools/train.py and tools/test.py: training, testing and resuming."""

import json
import os
import pickle
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from support import DEMOS, ROOT, TWO_ITERATIONS, forget_runs, load_tool

METRIC = dict(detection='coco/bbox_mAP', segmentation='mIoU')
TASKS = ['detection', pytest.param('segmentation', marks=pytest.mark.slow)]
DETECTOR = DEMOS['detection']


def log_of(work_dir):
    """Return the newest log of a training."""
    return max(work_dir.glob('*/*.log'), key=lambda file: file.stat().st_mtime_ns).read_text()


@pytest.fixture(scope='module', params=TASKS)
def trained(request, project, tmp_path_factory):
    """Train for two iterations; return the task, the work dir and the checkpoint."""
    task, work_dir = request.param, tmp_path_factory.mktemp('trained')
    arguments = [DEMOS[task], '--work-dir', work_dir, '--amp', '--auto-scale-lr']
    folder = os.getcwd()
    os.chdir(project)
    forget_runs()
    try:
        arguments = [*arguments, '--cfg-options', *TWO_ITERATIONS[task]]
        load_tool('train').main([str(argument) for argument in arguments])
    finally:
        os.chdir(folder)
    return task, work_dir, Path((work_dir / 'last_checkpoint').read_text())


def test_training_logs_and_evaluates(trained):
    task, work_dir, checkpoint = trained
    assert checkpoint.is_file()
    log = log_of(work_dir)
    assert METRIC[task] in log
    assert 'LR is set based on batch size of' in log
    records = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    assert 'loss' in json.loads(records[0])


def test_predictions_and_images(trained, call_tool, tmp_path):
    task, _, checkpoint = trained
    out = tmp_path / ('predictions.pkl' if task == 'detection' else 'maps')
    options = ['--out', out, '--show-dir', tmp_path / 'shown', '--work-dir', tmp_path / 'test']
    status, output, _ = call_tool('test', DEMOS[task], checkpoint, *options)
    assert status == 0
    assert METRIC[task] in output[output.index('metric ') :]
    assert len(output.splitlines()) < 50
    assert ' -1.0' not in output  # no object is large
    assert list((tmp_path / 'shown').rglob('*.jpg')) or list((tmp_path / 'shown').rglob('*.png'))
    if task == 'detection':
        predictions = pickle.loads(out.read_bytes())
        assert len(predictions) == 4
        assert predictions[0]['pred_instances']['bboxes'].shape[1] == 4
    else:
        assert len(list(out.glob('*.png'))) == 4


def test_several_data_sets(call_tool, checkpoints, tmp_path):
    config, out = tmp_path / 'config.py', tmp_path / 'predictions.pkl'
    config.write_text(f"""
_base_ = {str(DEMOS['detection'])!r}
data, metric = _base_.test_dataloader.dataset, _base_.test_evaluator
test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[data, data]))
test_evaluator = dict(
    _delete_=True,
    type='MultiDatasetsEvaluator',
    metrics=[metric, metric],
    dataset_prefixes=['a', 'b'],
)
""")
    arguments = [config, checkpoints / 'detection.pth', '--out', out, '--work-dir', tmp_path]
    status, output, _ = call_tool('test', *arguments)
    assert status == 0
    assert 'a/coco/bbox_mAP' in output
    assert 'b/coco/bbox_mAP' in output
    assert len(pickle.loads(out.read_bytes())) == 8


def test_metrics_of_any_kind():
    show = load_tool('test').format_metric
    values = (0.5, np.float32(0.25), 3, 'good', [1, 2], np.eye(2), {'a': 1})
    expected = ['0.500', '0.250', '3.000', 'good', '[1, 2]', '[[1. 0.] [0. 1.]]', "{'a': 1}"]
    assert [show('x', value) for value in values] == expected


def test_test_time_augmentation(trained, call_tool, tmp_path):
    task, _, checkpoint = trained
    arguments = [DEMOS[task], checkpoint, '--tta', '--work-dir', tmp_path]
    status, output, errors = call_tool('test', *arguments)
    if task == 'segmentation':
        assert status == 0
        assert 'mIoU' in output[output.index('metric ') :]
    else:
        assert status == 2
        assert 'has no tta_model' in errors.splitlines()[-1]


def test_resuming(trained, call_tool, tmp_path):
    task, work_dir, checkpoint = trained
    shutil.copytree(work_dir, tmp_path / 'run')
    checkpoint = tmp_path / 'run' / checkpoint.name
    (tmp_path / 'run/last_checkpoint').write_text(str(checkpoint))
    length, name = dict(
        detection=('train_cfg.max_epochs=2', 'epoch_2.pth'),
        segmentation=('train_cfg.max_iters=4', 'iter_4.pth'),
    )[task]
    options = [*(o for o in TWO_ITERATIONS[task] if 'max_' not in o), length]
    options += ['optim_wrapper.optimizer.lr=0.5', 'train_dataloader.num_workers=0']
    arguments = [DEMOS[task], '--work-dir', tmp_path / 'run', '--resume', '--cfg-options', *options]
    status, output, _ = call_tool('train', *arguments)
    assert status == 0
    assert f'Load checkpoint from {checkpoint}' in output
    assert 'iter: 2' in output
    summary = output.partition('training\n')[2].splitlines()[:5]
    assert [line.split()[0] for line in summary] == ['model', 'data', 'schedule', 'work', 'log']
    assert '16 images in batches of 8, 4 to validate' in summary[1]
    assert Path(summary[4].split()[-1]).is_file()
    assert output.splitlines()[-1].endswith(
        f'checkpoint: {os.path.relpath(tmp_path / "run" / name)}'
    )
    assert len(output.splitlines()) < 50
    assert 'Hooks will be executed' not in output
    assert 'Hooks will be executed' in log_of(tmp_path / 'run')
    assert 'validated' not in log_of(tmp_path / 'run')
    assert 'settings of the checkpoint, not of the config: lr 0.002 (config: 0.5)' in output
    assert (tmp_path / 'run' / name).is_file()


def test_mistakes_are_one_line_with_status_2(call_tool, tmp_path):
    config = ROOT / 'configs/detection/rdnet/faster-rcnn_rdnet-t_fpn_1x_coco.py'
    broken = tmp_path / 'broken.py'
    broken.write_text('model = (')
    for tool, arguments, message in (
        (
            'train',
            [config, '--work-dir', tmp_path],
            'data/coco/annotations/instances_train2017.json not found (for train_dataloader.'
            'dataset): if the data are elsewhere, add --cfg-options data_root=FOLDER',
        ),
        (
            'test',
            [DETECTOR, 'x.pth', '--work-dir', tmp_path, '--cfg-options', 'model.neck.num_out=5'],
            "model.neck: FPN has no argument 'num_out'; did you mean 'num_outs'?",
        ),
        ('train', [broken], f'{broken}: SyntaxError: '),
        (
            'train',
            [DETECTOR, '--cfg-options', 'train_dataloader.sampler.type=InfiniteSampler'],
            'train_dataloader.sampler: InfiniteSampler never ends, so an epoch would not either',
        ),
    ):
        status, _, errors = call_tool(tool, *arguments)
        assert status == 2
        assert errors.splitlines()[-1].startswith(f'error: {message}')


@pytest.mark.slow
@pytest.mark.parametrize('task', DEMOS)
def test_options_for_speed(task, call_tool, tmp_path):
    options = ['--amp-dtype', 'bfloat16', '--channels-last', '--compile-backbone']
    arguments = [DEMOS[task], '--work-dir', tmp_path, *options]
    status, output, _ = call_tool('train', *arguments, '--cfg-options', *TWO_ITERATIONS[task])
    assert status == 0
    assert 'in place of mixed precision' not in output
    assert METRIC[task] in output
    config = (tmp_path / DEMOS[task].name).read_text()
    for name in ('BFloat16OptimWrapper', 'ChannelsLastHook', 'CompileBackboneHook'):
        assert config.count(name) == 1
    checkpoint = (tmp_path / 'last_checkpoint').read_text()  # tested without these options
    status, *_ = call_tool('test', DEMOS[task], checkpoint, '--work-dir', tmp_path / 'test')
    assert status == 0


# Weights to start from


@pytest.mark.slow
@pytest.mark.parametrize('trained', ['detection'], indirect=True)
def test_weights_of_other_classes_and_of_a_part(trained, call_tool, tmp_path):
    checkpoint = torch.load(trained[2], weights_only=False)
    head = 'roi_head.bbox_head.fc_cls.bias'
    checkpoint['state_dict'][head] = torch.zeros(81)
    torch.save(checkpoint, tmp_path / 'others.pth')
    del checkpoint['state_dict']['backbone.stem.0.bias']
    torch.save(checkpoint, tmp_path / 'partial.pth')
    run = ['train', DETECTOR, '--work-dir', tmp_path]
    options = ['--cfg-options', *TWO_ITERATIONS['detection']]
    status, output, _ = call_tool(*run, '--load-from', tmp_path / 'others.pth', *options)
    assert status == 0
    assert f'{head} (file: [81]; model: [11])' in output
    partial = ['--load-from', tmp_path / 'partial.pth']
    status, _, errors = call_tool(*run, *partial, *options)
    assert status == 2
    assert 'tensors of backbone of FasterRCNN: missing: backbone.stem.0.bias' in errors
    status, *_ = call_tool(*run, *partial, '--min-loaded', '0.9', *options)
    assert status == 0
    # To test or to resume, all must be there.
    for name in ('others.pth', 'partial.pth'):
        for arguments in (
            ['test', DETECTOR, tmp_path / name, '--work-dir', tmp_path / 'test'],
            [*run, '--resume', tmp_path / name, *options],
        ):
            status, _, errors = call_tool(*arguments)
            assert status == 2
            assert f'wrong shape: {head} (file: [81]; model: [11])' in errors


# Real processes


@pytest.mark.slow
def test_two_processes_without_a_gpu(run_tool, tmp_path):
    env = dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    options = ['--work-dir', tmp_path, '--cfg-options', 'model.neck.norm_cfg.type=SyncBN']
    status, output = run_tool(
        *(ROOT / 'tools/dist_train.sh', DETECTOR, 2, *options, 'sync_bn=torch'),
        *(*TWO_ITERATIONS['detection'], 'train_dataloader.batch_size=4'),
        **env,
    )
    assert status == 0, output
    assert output.count('in place of SyncBN') == 1
    assert 'batches of 4 x 2 processes' in output
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    status, output = run_tool(ROOT / 'tools/dist_test.sh', DETECTOR, checkpoint, 2, *options, **env)
    assert status == 0, output
    assert output.count('coco/bbox_mAP_75 ') == 1  # one table, from one process


@pytest.mark.slow
@pytest.mark.parametrize('task', DEMOS)
def test_the_original_tools_train_and_test(task, run_tool, tmp_path):
    package = dict(detection='mmdet', segmentation='mmseg')[task]
    tools = Path(find_spec(package).origin).parent / '.mim/tools'
    options = ['--work-dir', tmp_path, '--cfg-options', *TWO_ITERATIONS[task]]
    status, output = run_tool(sys.executable, tools / 'train.py', DEMOS[task], *options)
    assert status == 0, output
    assert METRIC[task] in output
    # mmdet's test.py imports mmcv.ops before it reads the config.
    test = [sys.executable, '-m', 'mmdense', tools / 'test.py', DEMOS[task]]
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    status, output = run_tool(*test, checkpoint, '--work-dir', tmp_path)
    assert status == 0, output


# A recipe on other data by nothing but options on the command line.
CLASSES = "('background','0','1','2','3','4','5','6','7','8','9')"
OWN_DATA = [
    'data_root=data/digits',
    *(
        f'{loader}_dataloader.dataset.{option}'
        for loader, split in (('train', 'train'), ('val', 'val'), ('test', 'val'))
        for option in (
            'type=BaseSegDataset',
            f'data_prefix.img_path={split}',
            f'data_prefix.seg_map_path=semantic/{split}',
            f'metainfo.classes={CLASSES}',
            f'metainfo.palette={[(i, i, i) for i in range(11)]}',
        )
    ),
    'model.backbone.init_cfg=None',
    'model.decode_head.num_classes=11',
    'model.auxiliary_head.num_classes=11',
    'model.data_preprocessor.size=(96,96)',
    'train_dataloader.batch_size=2',
    'train_dataloader.dataset.indices=2',  # each step on the same two images
    'train_dataloader.dataset.pipeline.2.ratio_range=(1,1)',
    'train_dataloader.dataset.pipeline.2.scale=(384,96)',
    'train_dataloader.dataset.pipeline.3.crop_size=(96,96)',
    *(f'{loader}_dataloader.dataset.pipeline.1.scale=(96,96)' for loader in ('val', 'test')),
    *(f'{loader}_dataloader.num_workers=1' for loader in ('train', 'val')),
    *(f'tta_pipeline.1.transforms.0.{i}.scale=({32 + 16 * i},{32 + 16 * i})' for i in range(6)),
    'optim_wrapper.optimizer.lr=5e-4',
    'param_scheduler.0.end=2',
    'train_cfg.max_iters=8',
    'train_cfg.val_interval=8',
    'default_hooks.checkpoint.interval=8',
    'default_hooks.checkpoint.save_optimizer=False',
    'default_hooks.logger.interval=1',
    'log_processor.window_size=1',
    'randomness.seed=0',
]


@pytest.mark.slow
def test_a_recipe_on_other_data(call_tool, tmp_path):
    config = ROOT / 'configs/segmentation/rdnet/upernet_rdnet-t_amp-160k_ade20k-512x512.py'
    options = ['--work-dir', tmp_path, '--cfg-options', *OWN_DATA]
    status, output, _ = call_tool('train', config, *options)
    assert status == 0
    assert 'mIoU' in output
    assert 'layer decay' in output
    records = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [json.loads(r)['loss'] for r in records if 'loss' in json.loads(r)]
    assert len(losses) == 8
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), losses
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    status, output, _ = call_tool('test', config, checkpoint, '--tta', *options)
    assert status == 0
    assert 'mIoU' in output[output.index('metric ') :]
