"""tools/own_data.py on a few images of the demo data."""

import json

import pytest

from support import DEMOS


@pytest.mark.slow
def test_detectors_of_own_data(project, call_tool):
    out = project / 'own'
    status, output, errors = call_tool(
        *('own_data', '--data', 'data/digits', '--out', out, '--base', DEMOS['detection']),
        *('--backbones', DEMOS['detection'], 'timm:test_resnet'),
        *('--', '--epochs', '1', '--rounds', '1', '--pictures', '1'),
    )
    assert status == 0, output + errors
    assert output.splitlines()[-1].startswith('best: ')
    assert (out / 'report.html').stat().st_size
    dataset = json.loads((out / 'best/predictions.json').read_text())
    assert len(dataset['images']) == 4
    assert [c['name'] for c in dataset['categories']] == [str(i) for i in range(10)]


def test_missing_annotations(call_tool):
    status, _, errors = call_tool('own_data', '--data', 'nowhere')
    assert status == 2
    assert errors.splitlines()[-1] == (
        'error: no annotation file nowhere/annotations/instances_train.json: '
        'pass --data and --annotations'
    )
