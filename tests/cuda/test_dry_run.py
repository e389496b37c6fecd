"""Every backbone on fake CUDA tensors: what a GPU would refuse, wait for, or copy for nothing."""

import json

import pytest
import torch

from dev.dry_run.__main__ import COUNTS, lines_of
from dev.dry_run.fake_cuda import compiler
from dev.dry_run.rows import ROWS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason='torch is built without CUDA'),
    pytest.mark.skipif(compiler() is None, reason='no C compiler for the stub of the driver'),
]
TESTED = json.loads(COUNTS.read_text())


@pytest.fixture(scope='module')
def results():
    """The result of each row by its name: one process runs them all."""
    return {row.pop('row'): row for row in lines_of('dev.dry_run.rows')}


@pytest.mark.parametrize('row', ROWS)
def test_everything_stays_on_the_gpu_and_nothing_waits(results, row):
    result = results[row]
    assert not result['error']
    assert not result['on_cpu']
    assert not result['waits']


@pytest.mark.parametrize('row', [row for row in ROWS if 'NHWC' in row])
def test_channels_last_is_kept(results, row):
    """No line of mmdense copies a feature map, except where it takes a slice of channels."""
    known = ('_densenet_lean.py', 'deploy/condensenetv2.py', 'backbones/condensenetv2.py')
    moves = [move for move in results[row]['moves'] if not any(file in move for file in known)]
    assert not [move for move in moves if 'autograd' not in move]


def test_no_form_launches_more_than_it_did(results):
    """If one should: run ``python -m dev.dry_run`` and commit its counts with the reason."""
    if torch.__version__.split('+')[0] != TESTED['torch']:
        pytest.skip(f'counted with torch {TESTED["torch"]}')
    assert TESTED['rows'].keys() == ROWS.keys()
    more = {
        row: (results[row]['kernels'], kernels)
        for row, (kernels, _) in TESTED['rows'].items()
        if results[row].get('kernels', 0) > kernels
    }
    assert not more


@pytest.fixture(scope='module')
def scheduled():
    """What inductor schedules for training the first stages of each network, by its name."""
    return {row.pop('row'): row for row in lines_of('dev.dry_run.inductor')}


@pytest.mark.parametrize(
    ('network', 'kernels', 'size', 'kept'),
    [
        ('densenet plain', 1, 0.9, 0.6),
        ('densenet lean', 1.05, 0.97, 0.34),
        ('rdnet plain', 0.95, 0.86, 0.98),
        ('rdnet lean', 1.1, 0.98, 0.56),
        ('rexnet plain', 0.98, 0.73, 1.01),
        ('rexnet lean', 1.1, 0.82, 0.6),
    ],
)
def test_inductor_schedules_less_than_for_timm(scheduled, network, kernels, size, kept):
    """A torch whose compiler reads the options of ``compile()`` otherwise shows here."""
    mmdense, timm = scheduled[network], scheduled[f'{network.split()[0]} timm']
    assert mmdense['kernels'] < kernels * timm['kernels']
    assert mmdense['gb'] < size * timm['gb']
    assert mmdense['kept_gb'] < kept * timm['kept_gb']
