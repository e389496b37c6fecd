"""Training logs, and the curves plotted from them."""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest

from mmdense.errors import UserError
from mmdense.visualization import logs
from support import write_log


def test_read_scalars_joins_resumed_runs(tmp_path):
    def loss(value, step):
        return dict(loss=value, step=step)

    def metric(value, step=1):
        return {'coco/bbox_mAP': value, 'step': step}

    for run, records in (
        ('1', [loss(3.0, 50), loss(2.0, 100), metric(0.1)]),
        ('2', [loss(1.5, 100), metric(0.2), loss(1.0, 150)]),
        ('3', [metric(0.9, step=0)]),  # a test run, no training
        ('4', [metric(0.3)]),  # resumed for a validation
    ):
        write_log(tmp_path, records, run)
    losses, metrics = logs.read_scalars(tmp_path)
    assert [(r['step'], r['loss']) for r in losses] == [(50, 3.0), (100, 1.5), (150, 1.0)]
    assert [(r['iter'], r['coco/bbox_mAP']) for r in metrics] == [(100, 0.2), (150, 0.3)]
    # A run from the beginning is another training.
    write_log(tmp_path, [loss(9.0, 50)], '5')
    assert logs.read_scalars(tmp_path) == ([loss(9.0, 50)], [])


def test_metrics_of_any_name_and_kind(tmp_path):
    odd = dict(table=[[1.0]], note='x', time=1.0)
    write_log(
        tmp_path, [dict(loss=2.0, step=5), odd | {'voc/mAP': 0.2, 'voc/AP50': 0.4, 'step': 1}]
    )
    (run,) = logs.read_runs([tmp_path])
    assert run.metrics == [{'time': 1.0, 'voc/mAP': 0.2, 'voc/AP50': 0.4, 'step': 1, 'iter': 5}]
    assert logs.plot_runs([run], tmp_path / 'x.png') == ['loss', 'voc/mAP']
    assert logs.main_metrics(['voc/mAP', 'coco/bbox_mAP_50']) == ['coco/bbox_mAP_50']


@pytest.fixture
def run_dir(tmp_path):
    def write(name, records):
        write_log(tmp_path / name, records)
        return tmp_path / name

    return write


def pixels_of_runs(file):
    """Return the number of pixels in the colours of three runs."""
    pixels = cv2.imread(str(file))[..., ::-1].reshape(-1, 3).astype(int)
    colours = np.array(matplotlib.colormaps['tab10'].colors[:3]) * 255
    return [int((np.abs(pixels - colour).max(1) < 3).sum()) for colour in colours]


def test_runs_are_named_by_their_paths(run_dir, tmp_path):
    folders = [run_dir(name, [{'loss': 1.0, 'step': 1}]) for name in ('a/x', 'b/x', 'y')]
    runs = logs.read_runs([*folders, f'{folders[0]}/', tmp_path / 'y/../b/x'])
    assert [run.name for run in runs] == ['a/x', 'b/x', 'y']
    assert [run.name for run in logs.read_runs(folders[:1])] == ['x']
    with pytest.raises(UserError, match=f'no training log in {tmp_path / "z"}'):
        logs.read_runs([folders[0], tmp_path / 'z'])


def test_best_of_a_run():
    losses = [
        {'loss': value, 'acc': 90, 'time': 0.1, 'step': step}
        for step, value in ((1, 3.0), (2, float('nan')), (3, 1.0), (4, 2.0))
    ]
    metrics = [
        {'mIoU': 50.0, 'rmse': 0.4, 'abs_rel': float('nan'), 'time': 9.0, 'iter': 2},
        {'mIoU': 40.0, 'rmse': 0.5, 'iter': 4},
    ]
    run = logs.Run('x', losses, metrics)
    assert run.best('loss') == (3, 1.0)
    assert run.best('mIoU') == (2, 50.0)
    assert run.best('rmse') == (2, 0.4)
    assert run.series('rmse') == [(2, 0.4), (4, 0.5)]
    assert run.series('time')[-1] == (4, 0.1)  # of training
    assert [run.best(key) for key in ('abs_rel', 'time', 'acc', 'unknown')] == [None] * 4


def test_plot_runs_of_different_metrics(run_dir, tmp_path):
    steps = range(10, 1010, 10)
    boxes = [{'loss': 2.0 + i % 3, 'step': i} for i in steps] + [{'coco/bbox_mAP': 0.3, 'step': 1}]
    areas = [{'loss': 1.0, 'step': i} for i in steps] + [{'mIoU': 30.0, 'step': 1}]
    young = [{'loss': float('nan'), 'step': 10}, {'loss': 4.0, 'step': 20}]  # no validation yet
    records = dict(boxes=boxes, areas=areas, young=young)
    runs = logs.read_runs([run_dir(k, v) for k, v in records.items()])
    out = tmp_path / 'new/runs.png'
    assert logs.plot_runs(runs, out) == ['loss', 'coco/bbox_mAP', 'mIoU']
    shown = pixels_of_runs(out)
    assert min(shown) > 50
    assert logs.plot_runs(runs, out, keys=['mIoU', 'mIoU']) == ['mIoU']
    only_named = pixels_of_runs(out)[2]
    assert 0 < only_named < shown[2]  # a single loss is seen as well
    # Without a validation there is no panel of metrics.
    assert logs.plot_runs(runs[2:], out) == ['loss']
    logs.plot_runs(runs * 4, tmp_path / 'many.svg')
    assert (tmp_path / 'many.svg').read_text().count('<!-- boxes -->') == 4


def test_plot_runs_checks_keys_and_file(tmp_path):
    runs = [logs.Run('x', [{'loss': 1.0, 'lr': 0.1, 'step': 1}], [])]
    out = tmp_path / 'runs.png'
    for keys, file, message in (
        (['mIoU'], out, 'no run has logged mIoU; logged values: loss, lr'),
        (None, tmp_path / 'runs.tiff', 'must end in .pdf, .png, .svg'),
        (None, Path(__file__) / 'runs.png', 'cannot write'),
    ):
        with pytest.raises(UserError, match=message):
            logs.plot_runs(runs, file, keys=keys)
    assert not out.exists()


def test_losses_are_smoothed():
    values = np.array([0.0, 3, 0, 3, np.nan, 3, 0, 3])
    smooth = logs._smooth(values, 3)
    np.testing.assert_allclose(smooth, [1.5, 1, 2, 1.5, 3, 1.5, 2, 1.5])
    np.testing.assert_array_equal(logs._smooth(values, 0), values)
