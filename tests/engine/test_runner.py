"""The runner that training and testing start from."""

import logging
import sys

import pytest
import torch
from mmengine.hooks import CheckpointHook

from mmdense.config.edit import use_tta
from mmdense.config.read import load_config
from mmdense.engine.runner import build_runner, load_weights
from mmdense.errors import UserError
from support import DEMOS


@pytest.fixture
def demo(project, tmp_path):
    def load(task='detection'):
        options = dict(data_root=str(project / 'data/digits'))
        cfg = load_config(str(DEMOS[task]), options=options, work_dir=str(tmp_path))
        cfg.log_level = 'ERROR'
        return cfg

    return load


def test_missing_data_name_the_file_and_the_option(tmp_path):
    cfg = load_config(str(DEMOS['detection']), options=dict(data_root='/nowhere'))
    message = r'^/nowhere/annotations/instances_val.json .*for test_dataloader.dataset.*data_root='
    with pytest.raises(UserError, match=message):
        build_runner(cfg, loaders=('test',))


def test_weights_reach_the_model_inside_test_time_augmentation(demo, tmp_path):
    plain = build_runner(demo('segmentation'), loaders=('test',))
    file = str(tmp_path / 'x.pth')
    torch.save(dict(state_dict=plain.model.state_dict()), file)
    cfg = demo('segmentation')
    use_tta(cfg)
    runner = build_runner(cfg, loaders=('test',))
    load_weights(runner, file)
    for old, new in zip(plain.model.parameters(), runner.model.module.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.skipif(torch.cuda.is_available(), reason='gloo is used without a GPU')
def test_processes_without_gpu(demo, monkeypatch):
    env = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=29533)
    for key, value in env.items():
        monkeypatch.setenv(key, str(value))
    cfg = demo()
    cfg.update(launcher='pytorch', find_unused_parameters=True, sync_bn='torch')
    try:
        runner = build_runner(cfg, loaders=('train',))
        assert type(runner.model).__name__ == 'MMDistributedDataParallel'
        assert runner.model.find_unused_parameters
        assert 'sync_bn' not in cfg
    finally:
        torch.distributed.destroy_process_group()


def test_one_dimensional_parameters_do_not_decay(demo):
    runner = build_runner(demo(), loaders=('train',))
    for group in runner.build_optim_wrapper(runner.cfg.optim_wrapper).optimizer.param_groups:
        (parameter,) = group['params']
        assert (group['weight_decay'] == 0) == (parameter.ndim == 1)


def test_weights_that_are_refused(demo, tmp_path):
    """All other reasons are tested with the reading and loading of weights."""
    strict = build_runner(demo(), loaders=('test',))
    with pytest.raises(UserError, match='no checkpoint nowhere.pth'):
        load_weights(strict, 'nowhere.pth')
    file = tmp_path / 'x.pth'
    file.write_bytes(b'text')
    with pytest.raises(UserError, match=f'^{file} is damaged, or not a checkpoint'):
        load_weights(strict, str(file))
    state = strict.model.state_dict()
    torch.save(dict(state_dict={f'net.{k}': v for k, v in state.items()}), file)
    with pytest.raises(UserError, match=f"^{file}: .* fills 0 .* without the prefix 'net.'"):
        load_weights(strict, str(file))
    load_weights(build_runner(demo(), loaders=('test',), min_loaded=0), str(file))


@pytest.mark.parametrize('task', DEMOS)
def test_training_uses_resumable_loops_and_checkpoints(task, demo):
    cfg = demo(task)
    del cfg.default_hooks['checkpoint']
    kind = cfg.train_cfg.pop('type').removeprefix('mmdense.')
    by_epoch = kind.startswith('Epoch')
    cfg.train_cfg.by_epoch = by_epoch  # mmengine's short form
    cfg.custom_hooks.append(dict(type=CheckpointHook, interval=7, by_epoch=by_epoch))
    runner = build_runner(cfg, loaders=('train',))
    assert type(runner.train_loop).__module__ == 'mmdense.engine.loops'
    assert type(runner.train_loop).__name__ == kind
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    assert [type(hook).__module__ for hook in hooks] == ['mmdense.engine.checkpoint_hook'] * 2
    assert [hook.interval for hook in hooks] == [1 if by_epoch else 100, 7]
    assert [hook.by_epoch for hook in hooks] == [by_epoch] * 2


def test_a_log_file_on_a_full_disk_is_left_with_one_warning(demo, capfd):
    cfg = demo()
    cfg.log_level = 'INFO'
    runner = build_runner(cfg, loaders=())
    file, screen = (
        next(h for h in runner.logger.handlers if isinstance(h, logging.FileHandler) == is_file)
        for is_file in (True, False)
    )
    file.stream.close()
    file.stream = open('/dev/full', 'w')  # noqa: SIM115
    screen.stream = sys.stderr
    for i in range(3):
        runner.logger.info(f'line {i}')
    output = capfd.readouterr().err
    assert 'Traceback' not in output
    assert output.count('No space left on device): logging to it stops') == 1
    assert all(f'line {i}' in output for i in range(3))
    runner.logger.removeHandler(file)  # the logger outlives the test
    with pytest.raises(OSError, match='No space'):  # the rest of the buffer
        file.close()
