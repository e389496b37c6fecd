"""Changes that command-line options make to a config."""

import pytest
from mmengine.config import Config
from mmengine.hooks import EMAHook

from mmdense.config import edit
from mmdense.config.read import load_config
from mmdense.errors import UserError
from support import DEMOS, ROOT

COCO = str(ROOT / 'configs/detection/rdnet/faster-rcnn_rdnet-t_fpn_1x_coco.py')
PLAIN = dict(type='OptimWrapper')
AMP = dict(type='AmpOptimWrapper', loss_scale=512)
DYNAMIC = dict(type='AmpOptimWrapper', loss_scale='dynamic')
BFLOAT16 = dict(type='mmdense.BFloat16OptimWrapper')


@pytest.fixture
def cfg():
    return load_config(COCO)


@pytest.mark.parametrize(
    ('recipe', 'dtype', 'expected'),
    [
        ({}, None, DYNAMIC),
        (AMP, None, AMP),
        (BFLOAT16, None, BFLOAT16),
        ({}, 'bfloat16', BFLOAT16),
        (AMP, 'bfloat16', BFLOAT16),
        ({}, 'float16', dict(DYNAMIC, dtype='float16')),
        (AMP, 'float16', dict(AMP, dtype='float16')),
        (BFLOAT16, 'float16', dict(DYNAMIC, dtype='float16')),
    ],
)
def test_amp(recipe, dtype, expected, cfg):
    cfg.optim_wrapper.pop('type')  # mmengine's default
    cfg.optim_wrapper.update(recipe)
    rest = {k: v for k, v in cfg.optim_wrapper.items() if k not in AMP}
    edit.use_amp(cfg, dtype)
    assert cfg.optim_wrapper.to_dict() == {**rest, **expected}
    edit.drop_amp(cfg)  # of a machine without a GPU
    left = BFLOAT16 if expected == BFLOAT16 else PLAIN
    assert cfg.optim_wrapper.to_dict() == {**rest, **left}


def test_amp_of_another_kind(cfg):
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(UserError, match='ApexOptimWrapper'):
        edit.use_amp(cfg)


def test_hooks_are_added_once_and_first(cfg):
    hook = dict(type='mmdense.CompileBackboneHook')
    cfg.custom_hooks = None
    edit.use_compiled_backbone(cfg)
    assert cfg.custom_hooks == [hook]
    cfg.custom_hooks = [EMAHook(), dict(type='EMAHook')]
    for _ in range(2):
        edit.use_compiled_backbone(cfg)
    assert cfg.custom_hooks[0] == hook
    assert len(cfg.custom_hooks) == 3


def test_a_compiled_model_needs_no_compiled_backbone(cfg):
    cfg.compile = True
    with pytest.raises(UserError, match='--compile-backbone needs --cfg-options compile=False'):
        edit.use_compiled_backbone(cfg)


def test_tensorboard_is_added_to_the_local_log(cfg, monkeypatch):
    monkeypatch.setattr(edit, 'find_spec', lambda name: name == 'tensorboard')
    for _ in range(2):
        edit.use_tensorboard(cfg)
    kinds = [backend.type for backend in cfg.visualizer.vis_backends]
    assert kinds == ['LocalVisBackend', 'TensorboardVisBackend']
    monkeypatch.setattr(edit, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install tensorboard'):
        edit.use_tensorboard(cfg)


def test_auto_scale_lr(cfg):
    edit.use_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable
    cfg.pop('auto_scale_lr')
    with pytest.raises(UserError, match='base_batch_size'):
        edit.use_auto_scale_lr(cfg)


def test_tta_uses_model_and_pipeline(cfg):
    joined = load_config(COCO)
    parts = [cfg.test_dataloader.dataset.copy() for _ in range(2)]
    joined.test_dataloader.dataset = dict(type='ConcatDataset', datasets=parts)
    edit.use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.backbone.type == 'mmdense.RDNet'
    assert cfg.test_dataloader.dataset.pipeline[-1].type == 'TestTimeAug'
    edit.use_tta(joined)
    assert 'pipeline' not in joined.test_dataloader.dataset
    for part in joined.test_dataloader.dataset.datasets:
        assert part.pipeline[-1].type == 'TestTimeAug'


def test_predictions_of_a_detector_are_a_pickle(cfg):
    edit.write_predictions(cfg, 'x.pkl')
    assert cfg.custom_hooks[-1] == dict(type='mmdense.SavePredictionsHook', out_file='x.pkl')
    with pytest.raises(UserError, match='pkl'):
        edit.write_predictions(cfg, 'x.json')


def test_show_dir_is_relative_to_the_working_directory(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit.use_show_dir(cfg, 'shown')
    hook = cfg.default_hooks.visualization
    assert hook.test_out_dir == str(tmp_path / 'shown')
    assert hook.type == 'mmdense.DetVisualizationHook'  # which keeps images of one name apart
    del cfg.default_hooks.visualization
    with pytest.raises(UserError, match='visualization'):
        edit.use_show_dir(cfg, 'shown')


def test_epochs_are_stretched_and_warm_up_is_not():
    cfg = load_config(str(DEMOS['detection']))
    edit.set_length(cfg, epochs=4)
    assert cfg.train_cfg.max_epochs == 4
    warm_up, cosine = cfg.param_scheduler
    assert warm_up.end == 100
    assert (cosine.begin, cosine.end, cosine.T_max) == (1, 4, 3)
    edit.set_length(cfg, epochs=1)  # too short for the schedule after the warm-up
    assert [s.type for s in cfg.param_scheduler] == ['LinearLR']
    loop = dict(max_epochs=4)
    steps = Config(dict(train_cfg=loop, param_scheduler=dict(milestones=[2, 3])))
    edit.set_length(steps, epochs=12)
    assert [s.milestones for s in steps.param_scheduler] == [[6, 9]]


def test_iterations_are_stretched():
    cfg = load_config(str(DEMOS['segmentation']))
    edit.set_length(cfg, iters=40)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (40, 40)
    assert [(s.begin, s.end) for s in cfg.param_scheduler] == [(0, 10), (10, 40)]


@pytest.mark.parametrize(
    ('task', 'length', 'message'),
    [
        ('detection', dict(iters=3), 'counts epochs: give --epochs'),
        ('segmentation', dict(epochs=3), 'counts iters: give --iters'),
        ('detection', dict(epochs=0), '--epochs is 0, must be at least 1'),
    ],
)
def test_lengths_that_do_not_fit(task, length, message):
    with pytest.raises(UserError, match=message):
        edit.set_length(load_config(str(DEMOS[task])), **length)


OTHERS_HOOK = type('OthersHook', (EMAHook,), dict(__module__='others'))


@pytest.mark.parametrize('gpu', [False, True])
def test_loaders_fit_workers_and_device(gpu, cfg, monkeypatch):
    monkeypatch.setattr(edit.torch.cuda, 'is_available', lambda: gpu)
    options = dict(persistent_workers=True, prefetch_factor=2, timeout=9)
    cfg.train_dataloader = dict(num_workers=0, batch_size=1, **options)
    cfg.val_dataloader = dict(num_workers=2, pin_memory=False)
    cfg.test_dataloader = dict(num_workers=2, persistent_workers=False)
    cfg.val_cfg.fp16 = True
    edit.fit_to_machine(cfg, ['train', 'val', 'test'])
    assert cfg.train_dataloader == dict(num_workers=0, batch_size=1, pin_memory=gpu)
    assert cfg.val_dataloader == dict(num_workers=2, pin_memory=False, persistent_workers=True)
    assert cfg.test_dataloader == dict(num_workers=2, pin_memory=gpu, persistent_workers=False)
    assert cfg.val_cfg.fp16 == gpu


@pytest.mark.parametrize('hook', [dict(type=OTHERS_HOOK), OTHERS_HOOK()])
def test_hooks_that_may_change_the_data_set_keep_workers_short_lived(hook, cfg):
    cfg.custom_hooks = [hook]
    cfg.train_dataloader = dict(num_workers=2)
    edit.fit_to_machine(cfg, ['train', 'val'])
    assert 'persistent_workers' not in cfg.train_dataloader
    assert cfg.val_dataloader.persistent_workers  # of the recipe
