"""The command lines, run as users run them."""

import json
import pickle
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmdense.apis import deploy
from mmdense.weights.files import read_checkpoint
from support import CONDENSED, DEMOS, ROOT, TWO_ITERATIONS

TRAIN, TEST = ROOT / 'tools/train.py', ROOT / 'tools/test.py'
DEPLOY = ROOT / 'tools/deploy.py'
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


@pytest.fixture(scope='module')
def two_iterations_of_detection(project, run_tool, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('detection')
    config = DEMOS['detection']
    options = ['--work-dir', work_dir, '--cfg-options', *TWO_ITERATIONS['detection']]
    status, said = run_tool(PY, TRAIN, config, *options)
    assert status == 0, said
    return config, (work_dir / 'last_checkpoint').read_text()


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


def test_fast_training(task, run_tool, tmp_path):
    options = ['--amp-dtype', 'bfloat16', '--channels-last', '--compile-backbone']
    command = [PY, TRAIN, DEMOS[task], '--work-dir', tmp_path, *options]
    status, said = run_tool(*command, '--cfg-options', *TWO_ITERATIONS[task])
    assert status == 0, said
    assert 'in place of mixed precision' not in said
    assert ('coco/bbox_mAP' if task == 'detection' else 'mIoU') in said
    used = (tmp_path / DEMOS[task].name).read_text()
    for name in ('BFloat16OptimWrapper', 'ChannelsLastHook', 'CompileBackboneHook'):
        assert used.count(name) == 1
    # What was used to train it asks nothing of those who test it.
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    status, said = run_tool(PY, TEST, DEMOS[task], checkpoint, '--work-dir', tmp_path / 'test')
    assert status == 0, said


def test_weights_behind_a_prefix_stop_the_run_at_its_start(
    two_iterations_of_detection, run_tool, tmp_path
):
    config, checkpoint = two_iterations_of_detection
    init = ['model.backbone.init_cfg.type=Pretrained']
    init.append(f'model.backbone.init_cfg.checkpoint={checkpoint}')
    command = [PY, TRAIN, config, '--work-dir', tmp_path, '--cfg-options']
    command += [*TWO_ITERATIONS['detection'], *init]
    status, said = run_tool(*command)
    assert status == 2, said
    last = said.splitlines()[-1]
    assert last.startswith(f'error: {checkpoint} fills 0 of ')
    assert "would match without the prefix 'backbone.': add prefix='backbone.' to init_cfg" in last
    assert not list(tmp_path.glob('*.pth'))
    status, said = run_tool(*command, 'model.backbone.init_cfg.prefix=backbone.')
    assert status == 0, said
    assert '100.0% of its tensors' in said


def test_training_starts_from_a_model_of_other_classes(
    two_iterations_of_detection, run_tool, tmp_path
):
    config, checkpoint = two_iterations_of_detection
    held = read_checkpoint(checkpoint)
    head = 'roi_head.bbox_head.fc_cls.bias'
    held['state_dict'][head] = torch.zeros(81)
    torch.save(held, tmp_path / 'others.pth')
    del held['state_dict']['backbone.stem.0.bias']
    torch.save(held, tmp_path / 'partial.pth')
    command = [PY, TRAIN, config, '--work-dir', tmp_path]
    options = ['--cfg-options', *TWO_ITERATIONS['detection']]
    status, said = run_tool(*command, '--load-from', tmp_path / 'others.pth', *options)
    assert status == 0, said
    assert f'{head} (file: [81]; model: [11])' in said
    status, said = run_tool(*command, '--load-from', tmp_path / 'partial.pth', *options)
    assert status == 2, said
    assert 'tensors of backbone of FasterRCNN: missing: backbone.stem.0.bias' in said
    lenient = ['--min-loaded', '0.9']
    status, said = run_tool(*command, '--load-from', tmp_path / 'partial.pth', *lenient, *options)
    assert status == 0, said
    # To test a model, or to go on with a run, all must be there.
    for name in ('others.pth', 'partial.pth'):
        status, said = run_tool(PY, TEST, config, tmp_path / name)
        assert status == 2, said
        status, said = run_tool(*command, '--resume', tmp_path / name, *options)
        assert status == 2, said
        assert 'wrong shape: roi_head.bbox_head.fc_cls.bias (file: [81]; model: [11])' in said


def test_two_processes(run_tool, project, tmp_path):
    """On a machine without GPUs the processes talk through gloo."""
    env = dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    status, said = run_tool(
        ROOT / 'tools/dist_train.sh',
        DEMOS['detection'],
        2,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *TWO_ITERATIONS['detection'],
        'train_dataloader.batch_size=4',
        'model.neck.norm_cfg.type=SyncBN',
        'sync_bn=torch',
        **env,
    )
    assert status == 0, said
    assert said.count('in place of SyncBN') == 1
    assert 'Distributed training: True' in said
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    status, said = run_tool(
        ROOT / 'tools/dist_test.sh',
        DEMOS['detection'],
        checkpoint,
        2,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        'model.neck.norm_cfg.type=SyncBN',
        **env,
    )
    assert status == 0, said
    assert said.count('coco/bbox_mAP_75 ') == 1  # one table, from one process


def test_condensed_model_is_deployed(run_tool, project, tmp_path):
    """Train, prune, condense, deploy: the predictions stay the same."""
    options = ['--cfg-options', *TWO_ITERATIONS['detection'], 'model.test_cfg.rcnn.score_thr=0.0']
    options.append('custom_hooks.0.type=EMAHook')  # in place of ChannelsLastHook
    status, said = run_tool(PY, TRAIN, CONDENSED, '--work-dir', tmp_path, *options)
    assert status == 0, said
    assert 'condense: stage 3 of 3 at iteration 1 of 2, 25.0 % of the connections left' in said
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    out = tmp_path / 'deployed/model.pth'
    work_dir = ['--work-dir', tmp_path / 'deploying']
    status, said = run_tool(
        *(PY, DEPLOY, CONDENSED, checkpoint, '--out', out),
        *('--size', 64, 64, *work_dir, *options),
    )
    assert status == 0, said
    for form in ('learned', 'condensed', 'deployed'):
        assert form in said
    assert 'EMAHook' in out.with_suffix('.py').read_text()
    predictions = []
    runs = (CONDENSED, checkpoint, ()), (out.with_suffix('.py'), out, ('--deploy',))
    for config, weights, more in runs:
        file = tmp_path / f'{len(predictions)}.pkl'
        arguments = [config, weights, '--out', file, *work_dir, *more]
        status, said = run_tool(PY, TEST, *arguments, *([] if more else options))
        assert status == 0, said
        predictions.append(pickle.loads(file.read_bytes()))
    for before, after in zip(*predictions, strict=True):
        before, after = before['pred_instances'], after['pred_instances']
        assert before['scores'].numel()
        assert before['scores'].shape == after['scores'].shape
        assert (before['scores'] - after['scores']).abs().max() < 1e-4
    # What was deployed can be trained on, from its own weights and in a folder of its own.
    more = [*work_dir, '--cfg-options', *TWO_ITERATIONS['detection']]
    status, said = run_tool(PY, TRAIN, out.with_suffix('.py'), *more)
    assert status == 0, said
    assert f'Load checkpoint from {out}' in said


@pytest.mark.parametrize('name', ['rdnet-nano', 'densenet-nano', 'rexnet-0.5'])
def test_model_that_needs_no_condensing_is_deployed(name, run_tool, tmp_path):
    """The file holds the weights alone, which deploy() folds, and nobody folds again."""
    config = DEMOS['detection'].with_name(f'faster-rcnn_{name}_fpn_8e_digits.py')
    torch.manual_seed(0)
    model = build(config)
    state = model.state_dict()
    held = dict(state_dict=state, meta=dict(epoch=3), optimizer=dict(state={}))
    torch.save(held, tmp_path / 'trained.pth')
    out = tmp_path / 'deployed/model.pth'
    status, said = run_tool(
        *(PY, DEPLOY, config, tmp_path / 'trained.pth', '--out', out, '--size', 64, 96),
        *('--work-dir', tmp_path),
    )
    assert status == 0, said
    assert 'trained' in said
    assert 'deployed' in said
    assert 'not counted' not in said
    written = read_checkpoint(out)
    assert set(written) == {'meta', 'state_dict'}
    assert written['meta']['epoch'] == 3
    torch.testing.assert_close(written['state_dict'], state, rtol=0, atol=0)
    again = build(out.with_suffix('.py'))
    again.load_state_dict(written['state_dict'])
    deploy(again)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for x, y in zip(model.eval().backbone(image), again.eval().backbone(image), strict=True):
            assert (x - y).abs().max() < 1e-4 * x.abs().max()


def build(config):
    """Build a detector with the defaults of its layers for weights."""
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def test_deploying_what_cannot_be(two_iterations_of_detection, run_tool, tmp_path):
    config, checkpoint = two_iterations_of_detection
    shuffle = ROOT / 'configs/detection/baselines/faster-rcnn_shufflenetv2-0.5_fpn_1x_coco.py'
    out = ['--out', tmp_path / 'out.pth']
    for path, more, message in (
        (shuffle, out, 'error: ShuffleNetV2 has no inference form: '),
        (config, ['--out', tmp_path / 'out.onnx'], 'must end in .pth'),
        (config, ['--out', checkpoint], 'would overwrite'),
        (config, [*out, '--size', 0, -5], 'must be positive'),
        (config, ['--out', config / 'out.pth'], f'cannot write {config / "out.pth"}: '),
        (config, [*out, '--allow-partial'], 'is for CondenseNetV2, not for RDNet'),
    ):
        status, said = run_tool(PY, DEPLOY, path, checkpoint, *more, '--work-dir', tmp_path)
        assert status == 2, said
        assert message in said.splitlines()[-1]
    assert not (tmp_path / 'out.pth').exists()


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


# A recipe on other data, in small: nothing but options on the command line.
DIGITS = "('0','1','2','3','4','5','6','7','8','9')"
CASCADE = [
    'data_root=data/digits',
    'train_dataloader.dataset.ann_file=annotations/instances_train.json',
    'train_dataloader.dataset.data_prefix.img=train/',
    f'train_dataloader.dataset.metainfo.classes={DIGITS}',
    'val_dataloader.dataset.ann_file=annotations/instances_val.json',
    'val_dataloader.dataset.data_prefix.img=val/',
    f'val_dataloader.dataset.metainfo.classes={DIGITS}',
    'val_evaluator.ann_file=data/digits/annotations/instances_val.json',
    *(f'model.roi_head.bbox_head.{i}.num_classes=10' for i in range(3)),
    'model.roi_head.mask_head.num_classes=10',
    'train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[(96,96)]',
    'train_dataloader.dataset.pipeline.3.prob=(1.0,0.0)',
    'val_dataloader.dataset.pipeline.1.scale=(96,96)',
    *(f'model.train_cfg.rcnn.{i}.sampler.num=32' for i in range(3)),
    'model.test_cfg.rpn.max_per_img=20',
    'model.test_cfg.rcnn.score_thr=0.0',
    'train_cfg.max_epochs=8',
]
CLASSES = DIGITS.replace('(', "('background',")
UPERNET = [
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
    'model.decode_head.num_classes=11',
    'model.auxiliary_head.num_classes=11',
    'model.data_preprocessor.size=(96,96)',
    'train_dataloader.dataset.pipeline.2.scale=(384,96)',
    'train_dataloader.dataset.pipeline.3.crop_size=(96,96)',
    *(f'{loader}_dataloader.dataset.pipeline.1.scale=(96,96)' for loader in ('val', 'test')),
    *(f'tta_pipeline.1.transforms.0.{i}.scale=({32 + 16 * i},{32 + 16 * i})' for i in range(6)),
    'optim_wrapper.optimizer.lr=5e-4',
    'train_dataloader.dataset.pipeline.2.ratio_range=(1,1)',
    'train_cfg.max_iters=8',
]
RECIPES = dict(
    detection=('cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco', CASCADE, 'coco/segm_mAP'),
    segmentation=('upernet_rdnet-t_amp-160k_ade20k-512x512', UPERNET, 'mIoU'),
)


@pytest.mark.parametrize('task', RECIPES)
def test_recipe_trains_on_other_data(task, run_tool, tmp_path):
    name, options, metric = RECIPES[task]
    config = ROOT / f'configs/{task}/rdnet/{name}.py'
    options = [
        *options,
        'model.backbone.init_cfg=None',
        'param_scheduler.0.end=2',
        'train_cfg.val_interval=8',
        'default_hooks.checkpoint.interval=8',
        'default_hooks.checkpoint.save_optimizer=False',
        'train_dataloader.dataset.indices=2',  # each step on the same two images
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=1',
        'val_dataloader.num_workers=1',
        'default_hooks.logger.interval=1',
        'log_processor.window_size=1',
        'randomness.seed=0',
    ]
    status, said = run_tool(PY, TRAIN, config, '--work-dir', tmp_path, '--cfg-options', *options)
    assert status == 0, said
    assert metric in said
    assert 'layer decay' in said
    records = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [json.loads(r)['loss'] for r in records if 'loss' in json.loads(r)]
    assert len(losses) == 8
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), losses
    if task == 'segmentation':
        checkpoint = (tmp_path / 'last_checkpoint').read_text()
        status, said = run_tool(
            PY, TEST, config, checkpoint, '--tta', '--work-dir', tmp_path, '--cfg-options', *options
        )
        assert status == 0, said
        assert 'mIoU' in said[said.index('metric') :]


def test_without_weights_training_stops_with_one_line(run_tool, tmp_path):
    status, said = run_tool(
        PY,
        TRAIN,
        DEMOS['detection'],
        '--work-dir',
        tmp_path,
        '--cfg-options',
        'model.backbone.init_cfg.type=Pretrained',
        'model.backbone.init_cfg.checkpoint=timm://rdnet_tiny.nv_in1k',
        HF_HUB_OFFLINE='1',
        HF_HOME=tmp_path,
    )
    assert status == 2, said
    assert 'error: timm://rdnet_tiny.nv_in1k could not be downloaded (' in said
    assert 'get model.safetensors of naver-ai/rdnet_tiny.nv_in1k' in said
    assert 'Traceback' not in said
    assert not list(tmp_path.rglob('*.pth'))


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
