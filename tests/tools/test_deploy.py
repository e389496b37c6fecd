"""tools/deploy.py: from a trained checkpoint to one for inference."""

import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmdense.apis import deploy
from mmdense.weights.files import read_checkpoint
from support import CONDENSED, DEMOS, ROOT, TWO_ITERATIONS

DETECTOR = DEMOS['detection']


@pytest.mark.slow
def test_condensed_model_is_deployed(call_tool, tmp_path):
    """Train, prune, condense, deploy: the predictions stay the same."""
    options = ['--cfg-options', *TWO_ITERATIONS['detection'], 'model.test_cfg.rcnn.score_thr=0.0']
    options.append('custom_hooks.0.type=EMAHook')  # in place of ChannelsLastHook
    status, output, _ = call_tool('train', CONDENSED, '--work-dir', tmp_path, *options)
    assert status == 0
    assert 'condense: stage 3 of 3 at iteration 1 of 2, 25.0 % of the connections left' in output
    checkpoint = (tmp_path / 'last_checkpoint').read_text()
    out = tmp_path / 'deployed/model.pth'
    work_dir = ['--work-dir', tmp_path / 'deploying']
    arguments = [CONDENSED, checkpoint, '--out', out, '--size', 64, 64, *work_dir]
    status, output, _ = call_tool('deploy', *arguments, *options)
    assert status == 0
    for form in ('learned', 'condensed', 'deployed'):
        assert form in output
    assert len(output.splitlines()) < 30
    assert 'EMAHook' in out.with_suffix('.py').read_text()
    predictions = []
    for arguments in (
        [CONDENSED, checkpoint, '--out', tmp_path / 'a.pkl', *work_dir, *options],
        [out.with_suffix('.py'), out, '--out', tmp_path / 'b.pkl', *work_dir, '--deploy'],
    ):
        status, *_ = call_tool('test', *arguments)
        assert status == 0
        predictions.append(pickle.loads(arguments[3].read_bytes()))
    for before, after in zip(*predictions, strict=True):
        before, after = before['pred_instances'], after['pred_instances']
        assert before['scores'].numel()
        assert before['scores'].shape == after['scores'].shape
        assert (before['scores'] - after['scores']).abs().max() < 1e-4
    # Training continues from the deployed weights.
    more = [*work_dir, '--cfg-options', *TWO_ITERATIONS['detection']]
    status, output, _ = call_tool('train', out.with_suffix('.py'), *more)
    assert status == 0
    assert f'Load checkpoint from {out}' in output


def build(config):
    """Build a detector with random weights."""
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=pytest.mark.slow) for n in ('densenet-nano', 'rexnet-0.5')]
    + ['rdnet-nano'],
)
def test_other_models_keep_their_weights(name, call_tool, tmp_path):
    """The file has the weights only, and deploy() folds them after loading."""
    config = DETECTOR.with_name(f'faster-rcnn_{name}_fpn_8e_digits.py')
    model = build(config)
    state = model.state_dict()
    checkpoint = dict(state_dict=state, meta=dict(epoch=3), optimizer=dict(state={}))
    torch.save(checkpoint, tmp_path / 'trained.pth')
    out = tmp_path / 'deployed/model.pth'
    arguments = [config, tmp_path / 'trained.pth', '--out', out, '--size', 64, 96]
    status, output, _ = call_tool('deploy', *arguments, '--work-dir', tmp_path)
    assert status == 0
    assert 'trained' in output
    assert 'deployed' in output
    assert 'not counted' not in output
    written = read_checkpoint(out)
    assert set(written) == {'meta', 'state_dict'}
    assert written['meta']['epoch'] == 3
    torch.testing.assert_close(written['state_dict'], state, rtol=0, atol=0)
    deployed = build(out.with_suffix('.py'))
    deployed.load_state_dict(written['state_dict'])
    deploy(deployed)
    image = torch.randn(1, 3, 64, 96)
    backbones = model.eval().backbone, deployed.eval().backbone
    with torch.no_grad():
        for x, y in zip(*(backbone(image) for backbone in backbones), strict=True):
            assert (x - y).abs().max() < 1e-4 * x.abs().max()


def test_models_and_options_that_are_refused(call_tool, tmp_path):
    checkpoint = tmp_path / 'trained.pth'
    torch.save(dict(state_dict=build(DETECTOR).state_dict()), checkpoint)
    shuffle = ROOT / 'configs/detection/baselines/faster-rcnn_shufflenetv2-0.5_fpn_1x_coco.py'
    out = ['--out', tmp_path / 'out.pth']
    for config, more, message in (
        (shuffle, out, 'error: ShuffleNetV2 has no inference form: '),
        (DETECTOR, ['--out', tmp_path / 'out.onnx'], 'must end in .pth'),
        (DETECTOR, ['--out', checkpoint], 'would overwrite'),
        (DETECTOR, [*out, '--size', 0, -5], '--size: 0 is not an integer >= 1'),
        (DETECTOR, ['--out', DETECTOR / 'out.pth'], f'cannot write {DETECTOR / "out.pth"}: '),
    ):
        arguments = [config, checkpoint, *more, '--work-dir', tmp_path / 'work']
        status, _, errors = call_tool('deploy', *arguments)
        assert status == 2
        assert message in errors.splitlines()[-1]
    assert not (tmp_path / 'out.pth').exists()
