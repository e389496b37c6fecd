"""Two processes on one CPU (gloo) train and test like a single process."""

import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmdense.config import read
from mmdense.config.channels import fill_channels
from mmdense.datasets import make_digits
from mmdense.engine import runner as run
from mmdense.errors import UserError
from mmdense.weights.files import read_checkpoint
from support import DEMOS, ROOT

pytestmark = pytest.mark.slow

ITERS, SIDE = 3, 64
TRAIN, VAL = 16, 5  # images; the second number is odd
FSDP = {'runner_type': 'FlexibleRunner', 'strategy.type': 'FSDPStrategy'}
FSDP['strategy.state_dict_cfg'] = 'full'
# FSDP needs what torch has for CPUs since 2.5: older ones crash.
NEW_TORCH = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 5)
# Batch statistics would differ between one process and two, hence norm_eval.
BACKBONES = dict(
    rdnet=None,  # as in the demo config
    densenet=dict(
        type='mmdense.DenseNet',
        arch=dict(growth_rate=8, layers=(1, 2, 1)),
        norm_eval=True,
        memory='lean',
    ),
    condensenetv2=dict(
        type='mmdense.CondenseNetV2',
        arch=dict(layers=(2, 2), growth=(8, 8), groups=2),
        form='learned',
        norm_eval=True,
    ),
)


class Watch(Hook):
    """Record the loss and the gradients of every step."""

    def __init__(self):
        self.losses, self.grads = [], []

    def before_train(self, runner):
        def keep(optimizer, args, kwargs):
            named = runner.model.named_parameters()  # under FSDP, those of this process
            grads = {n.removeprefix('module.'): p.grad for n, p in named if p.grad is not None}
            self.grads.append({name: grad.clone() for name, grad in grads.items()})

        runner.optim_wrapper.optimizer.register_step_pre_hook(keep)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())


def segmentor(backbone, folder, images, **options):
    """Return the demo segmentor's config with SGD and no random augmentation."""
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='Resize', scale=(SIDE, SIDE), keep_ratio=False),
        dict(type='PackSegInputs'),
    ]
    groups = dict(type='GN', num_groups=8)
    options = {
        'data_root': str(folder / 'digits'),
        'train_cfg.max_iters': ITERS,
        'train_cfg.val_interval': 100,
        'train_dataloader.batch_size': images,
        'train_dataloader.num_workers': 0,
        'train_dataloader.sampler.seed': 0,  # a FlexibleRunner would draw another one
        'train_dataloader.dataset.pipeline': pipeline,
        'default_hooks.checkpoint.interval': ITERS,
        'model.data_preprocessor.size': (SIDE, SIDE),
        **{f'model.{head}.norm_cfg': groups for head in ('decode_head', 'auxiliary_head')},
        **{f'model.{head}.dropout_ratio': 0.0 for head in ('decode_head', 'auxiliary_head')},
        'optim_wrapper.clip_grad': None,
        'optim_wrapper.paramwise_cfg': None,
        **options,
    }
    cfg = read.load_config(str(DEMOS['segmentation']), options=options)
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.01)
    cfg.param_scheduler = []
    if backbone == 'rdnet' and 'strategy' not in cfg:
        cfg.optim_wrapper.constructor = 'mmdense.LayerDecayOptimWrapperConstructor'
        cfg.optim_wrapper.paramwise_cfg = dict(decay_rate=0.5)
    if BACKBONES[backbone]:
        cfg.model.backbone = ConfigDict(BACKBONES[backbone], out_indices=(0, 1))
        for head, index in (('decode_head', [0, 1]), ('auxiliary_head', 1)):
            cfg.model[head].update(in_channels='auto', in_index=index)
        fill_channels(cfg)
    if backbone == 'condensenetv2':
        cfg.custom_hooks = [dict(type='mmdense.CondenseScheduleHook')]
    return cfg


def trained(cfg, folder, launcher):
    """Train a config; return the losses, gradients and masks of this process."""
    cfg.update(launcher=launcher, work_dir=str(folder))
    # In float32 the difference that the order of a sum makes depends on the processor.
    torch.set_default_dtype(torch.float64)
    runner = run.build_runner(cfg, loaders=('train',))
    watch = Watch()
    runner.register_hook(watch)
    runner.train()
    torch.set_default_dtype(torch.float32)
    model = run.unwrap(runner.model)
    masks = {n: b.clone() for n, b in model.named_buffers() if n.endswith('mask')}
    return dict(losses=watch.losses, grads=watch.grads, masks=masks)


@MODELS.register_module()
class Oracle(BaseModel):
    """Predicts the ground truth, half of it wrong for every second image."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # DDP needs one

    def forward(self, inputs, data_samples, mode):
        for sample in data_samples:
            self.seen.append(Path(sample.img_path).stem)
            wrong = int(self.seen[-1]) % 2
            if isinstance(sample, DetDataSample):
                truth = sample.gt_instances
                labels = truth.labels.clone()
                labels[: wrong * len(labels) // 2 + wrong] += 1
                scores = torch.linspace(0.9, 0.5, len(labels)) - 0.01 * int(self.seen[-1])
                predictions = InstanceData(bboxes=truth.bboxes, labels=labels % 10, scores=scores)
                sample.pred_instances = predictions
            else:
                labels = sample.gt_sem_seg.data.clone()
                labels[:, : wrong * labels.shape[1] // 2] = 1
                sample.pred_sem_seg = PixelData(data=labels)
        return data_samples


def evaluated(task, folder, launcher):
    """Test the oracle; return the metrics and the images that each process evaluated."""
    options = {
        'data_root': str(folder / 'digits'),
        'test_dataloader.batch_size': 1,
        'test_dataloader.num_workers': 0,
    }
    cfg = read.load_config(str(DEMOS[task]), options=options)
    cfg.model = ConfigDict(type='Oracle')
    cfg.update(launcher=launcher, work_dir=str(folder / f'test-{task}-{launcher}'))
    cfg.default_hooks.pop('visualization')
    runner = run.build_runner(cfg, loaders=('test',))
    Oracle.seen = []
    metrics = runner.test()
    return dict(metrics=metrics, seen=all_gather_object(Oracle.seen))


def work(number, port, folder):
    """Run process 0 or 1 of two, or (number 2) the reference that works alone."""
    torch.set_num_threads(1)
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    Runner._log_env = lambda self, env_cfg: None
    launcher, images = 'none', 4
    if number < 2:
        env = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=2)
        env |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        os.environ.update({key: str(value) for key, value in env.items()})
        launcher, images = 'pytorch', 2
    results = {}
    for name in BACKBONES:
        cfg = segmentor(name, folder, images)
        results[name] = trained(cfg, folder / f'{name}-{launcher}', launcher)
    if NEW_TORCH:
        cfg = segmentor('rdnet', folder, images, **(FSDP if number < 2 else {}))
        cfg.optim_wrapper.update(constructor='DefaultOptimWrapperConstructor', paramwise_cfg=None)
        cfg.load_from = str(folder / 'start.pth')
        trained(cfg, folder / f'fsdp-{launcher}', launcher)
    for task in DEMOS:
        results[task] = evaluated(task, folder, launcher)
    torch.save(results, folder / f'{number}.pth')
    if number < 2:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    make_digits(folder / 'digits', train=TRAIN, val=VAL, size=SIDE)
    return folder


@pytest.fixture(scope='module')
def processes(folder):
    """Results of two processes, then of one that trains on the images of both."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    cfg = segmentor('rdnet', folder, 2)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), folder / 'start.pth')
    torch.multiprocessing.spawn(work, (port, folder), nprocs=3)
    return [torch.load(folder / f'{number}.pth', weights_only=False) for number in range(3)]


def weights(folder):
    return read_checkpoint(folder / f'iter_{ITERS}.pth')['state_dict']


def same(a, b):
    """Assert that two dicts of float64 tensors are equal but for rounding."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == torch.float64
        error = (value - b[name]).norm()
        assert error <= 1e-8 * b[name].norm() + 1e-12, (name, float(error))


@pytest.mark.parametrize('backbone', BACKBONES)
def test_two_processes_train_as_one_with_the_doubled_batch(backbone, processes, folder):
    """Covers layer decay (RDNet), lean memory (DenseNet) and pruning (CondenseNetV2)."""
    first, second, alone = (results[backbone] for results in processes)
    assert len(alone['grads']) == ITERS
    for one, other, both in zip(first['losses'], second['losses'], alone['losses'], strict=True):
        assert one != other  # from different images
        assert (one + other) / 2 == pytest.approx(both, rel=1e-8)
    for one, other, both in zip(first['grads'], second['grads'], alone['grads'], strict=True):
        same(one, both)
        for name, grad in one.items():
            assert torch.equal(grad, other[name])


def test_two_processes_prune_the_same_connections(processes):
    first, second, alone = (results['condensenetv2']['masks'] for results in processes)
    assert any((mask == 0).any() for mask in first.values())
    for name in first:
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], alone[name])


@pytest.mark.skipif(not NEW_TORCH, reason='torch 2.4 crashes under FSDP without a GPU')
def test_fsdp_trains_as_one_process(processes, folder):
    """Its checkpoint has the usual names and shapes."""
    start = read_checkpoint(folder / 'start.pth')['state_dict']
    ends = [weights(folder / f'fsdp-{launcher}') for launcher in ('pytorch', 'none')]
    same(*({name: end[name] - start[name] for name in end} for end in ends))


@pytest.mark.parametrize('task', DEMOS)
def test_an_odd_number_of_images_counts_each_once(task, processes):
    first, second, alone = (results[task] for results in processes)
    assert first['metrics'] == second['metrics'] == alone['metrics']
    key = dict(detection='coco/bbox_mAP', segmentation='mIoU')[task]
    assert 0 < alone['metrics'][key] < dict(detection=1, segmentation=100)[task]
    assert [len(seen) for seen in alone['seen']] == [VAL]
    shares = first['seen']
    assert [len(seen) for seen in shares] == [VAL // 2 + 1] * 2  # one image comes twice
    assert {*shares[0], *shares[1]} == {*alone['seen'][0]}


@pytest.mark.parametrize('key', ['clip_grad', 'paramwise_cfg'])
def test_fsdp_refuses_unsupported_settings(key, folder):
    cfg = segmentor('rdnet', folder, 2, **FSDP)
    cfg.optim_wrapper[key] = dict(max_norm=1.0) if key == 'clip_grad' else dict(flat_decay_mult=0.0)
    with pytest.raises(UserError, match=f'FSDP.*: add --cfg-options optim_wrapper.{key}=None'):
        run.build_runner(cfg, loaders=('train',))


KILL = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class KillHook(Hook):
    priority = 'LOWEST'

    def after_train_iter(self, runner, **_):
        if runner.rank == 1 and runner.iter == 2 and 'KILLED' in os.environ:
            open(os.environ['KILLED'], 'w').close()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope='module')
def killed(folder, run_tool):
    """Kill one of two processes in the third iteration, after the checkpoint of the second."""
    (folder / 'kill_hook.py').write_text(KILL)
    config = folder / 'config.py'
    config.write_text(
        f'_base_ = {str(DEMOS["segmentation"])!r}\n'
        "custom_imports = dict(imports=['mmdense', 'kill_hook'])\n"
        "custom_hooks = [dict(type='KillHook')]\n"
    )
    arguments = [
        '--cfg-options',
        f'data_root={folder / "digits"}',
        f'model.data_preprocessor.size=({SIDE},{SIDE})',
        f'train_dataloader.dataset.pipeline.2.scale=({SIDE},{SIDE})',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0',
        'default_hooks.checkpoint.interval=2',
        'train_cfg.max_iters=4',
        'train_cfg.val_interval=4',
    ]
    env = dict(PYTHONPATH=str(folder), CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    command = [ROOT / 'tools/dist_train.sh', config, 2, '--work-dir', folder / 'killed']
    env['KILLED'] = str(folder / 'sign')
    status, output = run_tool(*command, *arguments, **env)
    assert (folder / 'sign').exists(), output
    seconds = time.time() - (folder / 'sign').stat().st_mtime
    del env['KILLED']
    return config, arguments, env, status, output, seconds


def test_a_killed_process_ends_all(killed, folder):
    """The command returns once every process has closed its output."""
    *_, status, output, seconds = killed
    assert status not in (0, 2), output
    assert 'SIGKILL' in output  # torchrun's report
    assert seconds < 60
    assert [file.name for file in (folder / 'killed').glob('*.pth')] == ['iter_2.pth']


@pytest.mark.parametrize('processes', [1, 2])
def test_a_killed_training_resumes_with_any_number_of_processes(
    processes, killed, run_tool, folder
):
    config, arguments, env, *_ = killed
    work_dir = folder / f'resumed-{processes}'
    shutil.copytree(folder / 'killed', work_dir)
    command = [ROOT / 'tools/dist_train.sh', config, processes]
    if processes == 1:
        command = [sys.executable, ROOT / 'tools/train.py', config]
    resume = ['--work-dir', work_dir, '--resume']
    status, output = run_tool(*command, *resume, *arguments, **env)
    assert status == 0, output
    assert (f' x {processes} processes' in output) == (processes > 1)
    assert 'resumed epoch: 0, iter: 2' in output
    assert 'mIoU' in output
    checkpoint = read_checkpoint(work_dir / 'iter_4.pth')
    assert checkpoint['meta']['iter'] == 4
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
