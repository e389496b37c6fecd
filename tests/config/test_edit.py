"""Configs as the tools read and change them, and the mistakes that they explain."""

import logging
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook

from mmdense.config import edit as config
from mmdense.config import read, validate
from mmdense.engine import resume
from mmdense.engine import runner as run
from mmdense.errors import UserError
from support import DEMOS, ROOT

COCO = str(ROOT / 'configs/detection/rdnet/faster-rcnn_rdnet-t_fpn_1x_coco.py')
AMP = dict(type='AmpOptimWrapper', loss_scale=512)
BFLOAT16 = dict(type='mmdense.BFloat16OptimWrapper')


def test_work_dir_and_options():
    cfg = read.load_config(COCO, options={'model.backbone.arch': 'small'})
    assert cfg.work_dir == 'work_dirs/faster-rcnn_rdnet-t_fpn_1x_coco'
    assert cfg.model.backbone.arch == 'small'
    assert read.load_config(COCO, work_dir='elsewhere').work_dir == 'elsewhere'


@pytest.mark.parametrize('path', [COCO, *map(str, DEMOS.values())])
def test_data_root_moves_every_path(path):
    cfg = read.load_config(path, options=dict(data_root='/big/disk'))
    old = Config.fromfile(path).data_root
    assert old not in cfg.pretty_text
    assert cfg.train_dataloader.dataset.data_root == '/big/disk/'
    assert cfg.test_dataloader.dataset.data_root == '/big/disk/'
    if 'ann_file' in cfg.val_evaluator:
        assert cfg.val_evaluator.ann_file.startswith('/big/disk/annotations/')


def test_unknown_config_suggests_one():
    with pytest.raises(UserError, match='did you mean .*faster-rcnn_rdnet-t_fpn_1x_coco.py'):
        read.load_config(COCO.replace('rdnet-t', 'rdnet-tiny'))


def test_missing_base(tmp_path):
    file = tmp_path / 'leaf.py'
    file.write_text("_base_ = './nowhere.py'\n")
    with pytest.raises(UserError, match='inherits a config that does not exist.*nowhere'):
        read.load_config(str(file))


def test_config_without_model():
    with pytest.raises(UserError, match='names no model'):
        read.load_config(str(ROOT / 'configs/detection/_base_/coco_adamw-1x.py'))


def test_data_root_needs_one_to_replace(tmp_path):
    file = tmp_path / 'leaf.py'
    file.write_text("model = dict(type='mmdense.RDNet')\n")
    with pytest.raises(UserError, match='has no data_root'):
        read.load_config(str(file), options=dict(data_root='x'))
    with pytest.raises(UserError, match='data_root is empty'):
        read.load_config(COCO, options=dict(data_root=''))


def test_data_root_moves_folders_not_prefixes(tmp_path):
    file = tmp_path / 'leaf.py'
    file.write_text(
        "model = dict(type='SGD')\ndata_root = 'data/ade'\n"
        "paths = ('data/ade', 'data/ade/x.json', 'data/ade_more/x.json')\n"
    )
    cfg = read.load_config(str(file), options=dict(data_root='/new/'))
    assert cfg.paths == ('/new', '/new/x.json', 'data/ade_more/x.json')
    assert cfg.data_root == '/new'


def test_amp_and_its_absence():
    cfg = read.load_config(COCO)
    config.use_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    config.drop_amp(cfg)
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper


def test_amp_of_the_recipe_stays():
    cfg = read.load_config(COCO)
    cfg.optim_wrapper.pop('type')  # mmengine's default
    config.use_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale=512)
    config.use_amp(cfg)
    assert cfg.optim_wrapper.loss_scale == 512
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(UserError, match='ApexOptimWrapper'):
        config.use_amp(cfg)


@pytest.mark.parametrize(
    ('recipe', 'dtype', 'expected'),
    [
        ({}, 'bfloat16', dict(type='mmdense.BFloat16OptimWrapper')),
        (AMP, 'bfloat16', dict(type='mmdense.BFloat16OptimWrapper')),
        ({}, 'float16', dict(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16')),
        (AMP, 'float16', dict(type='AmpOptimWrapper', loss_scale=512, dtype='float16')),
        (AMP, None, AMP),
        (BFLOAT16, None, BFLOAT16),
        (BFLOAT16, 'float16', dict(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16')),
    ],
)
def test_amp_in_the_type_asked_for(recipe, dtype, expected):
    cfg = read.load_config(COCO)
    cfg.optim_wrapper.update(recipe)
    rest = {k: v for k, v in cfg.optim_wrapper.items() if k not in AMP}
    config.use_amp(cfg, dtype)
    assert cfg.optim_wrapper.to_dict() == {**rest, **expected}


def test_bfloat16_is_not_dropped():
    cfg = read.load_config(COCO)
    config.use_amp(cfg, 'bfloat16')
    before = cfg.optim_wrapper.to_dict()
    config.drop_amp(cfg)
    assert cfg.optim_wrapper.to_dict() == before


@pytest.mark.parametrize(
    ('use', 'hook'),
    [
        (config.use_channels_last, dict(type='mmdense.ChannelsLastHook')),
        (config.use_compiled_backbone, dict(type='mmdense.CompileBackboneHook')),
    ],
)
def test_hooks_are_added_once_and_first(use, hook):
    cfg = read.load_config(COCO)
    cfg.custom_hooks = None
    use(cfg)
    assert cfg.custom_hooks == [hook]
    cfg.custom_hooks = [EMAHook(), dict(type='EMAHook')]
    use(cfg)
    use(cfg)
    assert cfg.custom_hooks[0] == hook
    assert len(cfg.custom_hooks) == 3


def test_tensorboard_is_added_to_the_local_log(monkeypatch):
    cfg = read.load_config(COCO)
    monkeypatch.setattr(config, 'find_spec', lambda name: name == 'tensorboard')
    for _ in range(2):
        config.use_tensorboard(cfg)
    kinds = [backend.type for backend in cfg.visualizer.vis_backends]
    assert kinds == ['LocalVisBackend', 'TensorboardVisBackend']
    monkeypatch.setattr(config, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install tensorboard'):
        config.use_tensorboard(cfg)


def test_a_compiled_model_needs_no_compiled_backbone():
    cfg = read.load_config(COCO, options=dict(compile=True))
    with pytest.raises(UserError, match='--compile-backbone needs --cfg-options compile=False'):
        config.use_compiled_backbone(cfg)


def test_auto_scale_lr():
    cfg = read.load_config(COCO)
    config.use_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable
    cfg.pop('auto_scale_lr')
    with pytest.raises(UserError, match='base_batch_size'):
        config.use_auto_scale_lr(cfg)


def training(file, **meta):
    """Write the checkpoint of a training."""
    held = dict(meta=dict(epoch=1, iter=1, **meta), state_dict={}, message_hub={}, optimizer={})
    torch.save(held, file)
    return file


def test_resume(tmp_path):
    file = training(tmp_path / 'x.pth')
    cfg = read.load_config(COCO, work_dir=str(tmp_path))
    resume.use_checkpoint(cfg, str(file))
    assert cfg.resume
    assert cfg.load_from == str(file)
    with pytest.raises(UserError, match='no checkpoint nowhere.pth'):
        resume.use_checkpoint(cfg, 'nowhere.pth')
    (tmp_path / 'last_checkpoint').write_text(str(file))
    cfg.load_from = 'another'
    resume.use_checkpoint(cfg, 'auto')
    assert cfg.resume
    assert cfg.load_from == str(file)
    file.write_bytes(file.read_bytes()[:-100])
    for choice in ('auto', str(file)):
        with pytest.raises(UserError, match='x.pth is damaged'):
            resume.use_checkpoint(cfg, choice)


@pytest.mark.parametrize('by_option', [False, True])
@pytest.mark.parametrize('seed', [None, 5])
def test_a_resumed_run_keeps_its_seed(by_option, seed, tmp_path):
    """mmengine restores it after the samplers have been built with another."""
    file = training(tmp_path / 'x.pth', seed=7)
    cfg = read.load_config(COCO, work_dir=str(tmp_path))
    if seed:
        cfg.randomness = dict(seed=seed, deterministic=True)
    if by_option:
        resume.use_checkpoint(cfg, str(file))
    else:
        cfg.resume = True  # as a config may say
        resume.use_checkpoint(cfg, None)
        assert cfg.load_from == str(file)
    assert cfg.randomness.seed == (seed or 7)
    assert cfg.randomness.get('deterministic', False) == bool(seed)


@pytest.mark.parametrize('other', [None, 'x.pth'])
def test_a_first_start_with_resume_begins_as_without(other, tmp_path):
    cfg = read.load_config(COCO, work_dir=str(tmp_path))
    if other:
        torch.save(dict(state_dict={}), tmp_path / other)
        cfg.load_from = str(tmp_path / other)
    resume.use_checkpoint(cfg, 'auto')
    assert not cfg.resume
    # Weights come from one of the two: never from neither.
    assert ('init_cfg' in cfg.model.backbone) == (other is None)
    assert cfg.get('load_from') == (str(tmp_path / other) if other else None)


@pytest.mark.parametrize('choice', [None, 'auto', 'latest in the work dir', 'x.pth'])
def test_resuming_asks_for_no_imagenet_weights(tmp_path, choice):
    file = tmp_path / 'x.pth'
    if choice in ('x.pth', 'latest in the work dir'):
        training(file)
    else:
        torch.save(dict(state_dict={}), file)
    cfg = read.load_config(COCO, work_dir=str(tmp_path))
    if choice == 'latest in the work dir':
        (tmp_path / 'last_checkpoint').write_text(str(file))
    resume.use_checkpoint(cfg, str(file) if choice == 'x.pth' else choice and 'auto')
    assert ('init_cfg' in cfg.model.backbone) == (choice in (None, 'auto'))


def test_load_from(tmp_path):
    file = tmp_path / 'x.pth'
    file.touch()
    cfg = read.load_config(COCO)
    resume.use_checkpoint(cfg, None, str(file))
    assert cfg.load_from == str(file)
    assert not cfg.get('resume')
    assert 'init_cfg' not in cfg.model.backbone  # all of the backbone must come from the file
    cfg = read.load_config(COCO)
    resume.use_checkpoint(cfg, None, str(file), min_loaded=0.5)
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('timm://')
    cfg = read.load_config(COCO, options=dict(load_from=str(file)))
    resume.use_checkpoint(cfg, None)
    assert 'init_cfg' not in cfg.model.backbone
    with pytest.raises(UserError, match='no checkpoint nowhere.pth'):
        resume.use_checkpoint(cfg, None, 'nowhere.pth')
    with pytest.raises(UserError, match='choose one'):
        resume.use_checkpoint(cfg, 'auto', str(file))


def test_tta_takes_model_and_pipeline():
    cfg = read.load_config(COCO)
    config.use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.backbone.type == 'mmdense.RDNet'
    assert cfg.test_dataloader.dataset.pipeline[-1].type == 'TestTimeAug'


def test_tta_reaches_joined_data_sets():
    cfg = read.load_config(COCO)
    parts = [cfg.test_dataloader.dataset.copy() for _ in range(2)]
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=parts)
    config.use_tta(cfg)
    assert 'pipeline' not in cfg.test_dataloader.dataset
    for part in cfg.test_dataloader.dataset.datasets:
        assert part.pipeline[-1].type == 'TestTimeAug'


def test_out_of_a_detector_is_a_pickle():
    cfg = read.load_config(COCO)
    config.write_predictions(cfg, 'x.pkl')
    assert [m.type for m in cfg.test_evaluator] == ['CocoMetric', 'DumpDetResults']
    with pytest.raises(UserError, match='pkl'):
        config.write_predictions(cfg, 'x.json')


def test_show_dir_is_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = read.load_config(COCO)
    config.use_show_dir(cfg, 'shown')
    assert cfg.default_hooks.visualization.test_out_dir == str(tmp_path / 'shown')
    del cfg.default_hooks.visualization
    with pytest.raises(UserError, match='visualization'):
        config.use_show_dir(cfg, 'shown')


def demo(task, project, tmp_path, **options):
    options = dict(options, data_root=str(project / 'data/digits'))
    cfg = read.load_config(str(DEMOS[task]), options=options, work_dir=str(tmp_path))
    cfg.log_level = 'ERROR'
    return cfg


def test_missing_data_names_file_and_option(tmp_path):
    cfg = read.load_config(COCO, options=dict(data_root='/nowhere'))
    with pytest.raises(
        UserError, match=r'^/nowhere/annotations/instances_val2017.json .*data_root='
    ):
        run.build_runner(cfg, loaders=('test',))


@pytest.mark.parametrize(
    ('task', 'key', 'value', 'message'),
    [
        ('detection', 'neck', [64, 96, 100], r'neck expects .64, 96, 100. .*gives .64, 96, 144.'),
        ('segmentation', 'decode_head', [1, 2, 3], r'decode_head expects .1, 2, 3. '),
        ('segmentation', 'auxiliary_head', 7, 'auxiliary_head expects 7 .*gives 144'),
    ],
)
def test_channels_that_do_not_fit(project, tmp_path, task, key, value, message):
    cfg = demo(task, project, tmp_path, **{f'model.{key}.in_channels': value})
    with pytest.raises(UserError, match=message):
        run.build_runner(cfg, loaders=())


@pytest.mark.parametrize(
    ('key', 'message'),
    [
        ('neck.out_channels', r'model.rpn_head.in_channels is 48, but the neck puts out 32: '),
        ('rpn_head.in_channels', r'model.rpn_head.in_channels is 32, but the neck puts out 48: '),
        ('roi_head.bbox_roi_extractor.out_channels', r'bbox_roi_extractor.out_channels is 32, '),
    ],
)
def test_a_neck_that_does_not_fit_its_heads(project, tmp_path, key, message):
    cfg = demo('detection', project, tmp_path, **{f'model.{key}': 32})
    with pytest.raises(UserError, match=message):
        run.build_runner(cfg, loaders=())


def test_concatenating_head_names_each_channel(project, tmp_path):
    head = {'type': 'FCNHead', 'in_index': [0, 1], 'input_transform': 'resize_concat'}
    options = {f'model.auxiliary_head.{k}': v for k, v in head.items()}
    options['model.auxiliary_head.in_channels'] = [64, 96]
    run.build_runner(demo('segmentation', project, tmp_path, **options), loaders=())
    options['model.auxiliary_head.in_channels'] = [64, 97]
    with pytest.raises(UserError, match=r'expects .64, 97. channels, .*gives .64, 96.'):
        run.build_runner(demo('segmentation', project, tmp_path, **options), loaders=())


def test_head_that_reads_a_map_too_many(project, tmp_path):
    cfg = demo('segmentation', project, tmp_path, **{'model.decode_head.in_index': [0, 1, 3]})
    with pytest.raises(UserError, match=r'in_index is .0, 1, 3., but the backbone returns 3 maps'):
        run.build_runner(cfg, loaders=())


@pytest.mark.parametrize(
    'neck',
    [
        dict(type='DilatedEncoder', in_channels=144),
        dict(type='YOLOV3Neck', in_channels=[144, 96, 64]),
        [dict(type='FPN', in_channels=[64, 96, 144]), dict(type='BFP', in_channels=48)],
        None,
    ],
)
def test_other_necks_are_let_through(neck):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Identity()
            self.backbone.out_channels = (64, 96, 144)

    validate.check_channels(Model(), dict(neck=neck))


def test_weights_reach_the_model_inside_test_time_augmentation(project, tmp_path):
    cfg = demo('segmentation', project, tmp_path)
    plain = run.build_runner(cfg, loaders=('test',))
    file = str(tmp_path / 'x.pth')
    torch.save(dict(state_dict=plain.model.state_dict()), file)
    cfg = demo('segmentation', project, tmp_path)
    config.use_tta(cfg)
    runner = run.build_runner(cfg, loaders=('test',))
    run.load_weights(runner, file)
    for old, new in zip(plain.model.parameters(), runner.model.module.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.skipif(torch.cuda.is_available(), reason='gloo stands in where there is no GPU')
def test_processes_without_gpu(project, tmp_path, monkeypatch):
    env = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=29533)
    for key, value in env.items():
        monkeypatch.setenv(key, str(value))
    cfg = demo('detection', project, tmp_path)
    cfg.update(launcher='pytorch', find_unused_parameters=True)
    try:
        runner = run.build_runner(cfg, loaders=('train',))
        assert type(runner.model).__name__ == 'MMDistributedDataParallel'
        assert runner.model.find_unused_parameters
    finally:
        torch.distributed.destroy_process_group()


def test_one_dimensional_parameters_do_not_decay(project, tmp_path):
    runner = run.build_runner(demo('detection', project, tmp_path), loaders=('train',))
    for group in runner.build_optim_wrapper(runner.cfg.optim_wrapper).optimizer.param_groups:
        (parameter,) = group['params']
        assert (group['weight_decay'] == 0) == (parameter.ndim == 1)


def test_checkpoints_that_are_none(project, tmp_path):
    runner = run.build_runner(demo('detection', project, tmp_path), loaders=('test',))
    with pytest.raises(UserError, match='no checkpoint nowhere.pth'):
        run.load_weights(runner, 'nowhere.pth')
    file = tmp_path / 'x.pth'
    for content, what in (
        (b'', 'is empty'),
        (b'not a checkpoint', 'is damaged, or not a checkpoint'),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f'^{file} {what}'):
            run.load_weights(runner, str(file))
    own = runner.model.state_dict()
    for spoil, said in (
        (
            {f'net.{k}': v for k, v in own.items()},
            "fills 0 of .* would match without the prefix 'net.'",
        ),
        ({**own, 'rpn_head.rpn_cls.bias': torch.zeros(7)}, r'rpn_cls.bias \(file: \[7\]; model'),
        ({k: v for k, v in own.items() if 'fc_reg.bias' not in k}, 'missing: .*fc_reg.bias'),
    ):
        torch.save(dict(state_dict=spoil), file)
        with pytest.raises(UserError, match=f'^{file}: the checkpoint .*{said}'):
            run.load_weights(runner, str(file))
        lenient = run.build_runner(
            demo('detection', project, tmp_path), loaders=('test',), min_loaded=0
        )
        run.load_weights(lenient, str(file))
    torch.save(dict(state_dict=runner.model.state_dict()), file)
    with torch.no_grad():
        before = runner.model.backbone.stem[0].weight.clone()
        runner.model.backbone.stem[0].weight.zero_()
    run.load_weights(runner, str(file))
    assert torch.equal(runner.model.backbone.stem[0].weight, before)


@pytest.mark.parametrize('task', DEMOS)
def test_training_takes_loops_and_checkpoints_of_ours(task, project, tmp_path):
    cfg = demo(task, project, tmp_path)
    del cfg.default_hooks['checkpoint']
    kind = cfg.train_cfg.pop('type')
    cfg.train_cfg.by_epoch = kind.startswith('Epoch')  # mmengine's short form
    cfg.custom_hooks.append(dict(type=CheckpointHook, interval=7))
    runner = run.build_runner(cfg, loaders=('train',))
    assert type(runner.train_loop).__module__ == 'mmdense.engine.loops'
    assert type(runner.train_loop).__name__ == kind
    kept = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    assert [type(hook).__module__ for hook in kept] == ['mmdense.engine.checkpoint_hook'] * 2
    assert [hook.interval for hook in kept] == [1, 7]


def test_a_log_file_on_a_full_disk_is_left_out_with_one_line(project, tmp_path, capfd):
    cfg = demo('detection', project, tmp_path)
    cfg.log_level = 'INFO'
    runner = run.build_runner(cfg, loaders=())
    file, screen = (
        next(h for h in runner.logger.handlers if isinstance(h, logging.FileHandler) == wanted)
        for wanted in (True, False)
    )
    file.stream.close()
    file.stream = open('/dev/full', 'w')  # noqa: SIM115
    screen.stream = sys.stderr
    for i in range(3):
        runner.logger.info(f'line {i}')
    said = capfd.readouterr().err
    assert 'Traceback' not in said
    assert said.count('No space left on device): the log goes on without it') == 1
    assert all(f'line {i}' in said for i in range(3))
    runner.logger.removeHandler(file)  # the logger lives on
    with pytest.raises(OSError, match='No space'):  # what is left in the buffer
        file.close()
