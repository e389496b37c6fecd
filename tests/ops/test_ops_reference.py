"""Comparison with recorded results of mmcv's compiled operators; see make_mmcv_reference.py."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location('reference', HERE / 'make_mmcv_reference.py')
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

CASES = dict(reference.cases())


@pytest.fixture(scope='module')
def recorded():
    with np.load(HERE / 'data' / 'mmcv_reference.npz') as file:
        return dict(file)


def test_every_case_is_recorded(recorded):
    assert set(recorded) == {f'{name}/0' for name in CASES}


@pytest.mark.parametrize('name', CASES)
def test_equals_compiled_mmcv(recorded, name):
    arrays = reference.run(CASES[name], seed=0)
    for output, expected in reference.unpack(recorded[f'{name}/0'], arrays).items():
        np.testing.assert_allclose(arrays[output], expected, rtol=2e-6, atol=1e-5, err_msg=output)
