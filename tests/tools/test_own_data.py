"""The example of a user's own data, on a few images of the demo's."""

import json
import sys

import pytest

from support import DEMOS, ROOT


@pytest.mark.slow
def test_own_data(project, run_tool):
    out = project / 'own'
    status, output = run_tool(
        sys.executable,
        ROOT / 'tools/own_data.py',
        *('--data', 'data/digits', '--out', out, '--base', DEMOS['detection']),
        *('--backbones', DEMOS['detection'], 'timm:test_resnet'),
        *('--', '--epochs', '1', '--rounds', '1', '--pictures', '1'),
    )
    assert status == 0, output
    assert output.splitlines()[-1].startswith('best: ')
    assert (out / 'report.html').stat().st_size
    written = json.loads((out / 'best/predictions.json').read_text())
    assert len(written['images']) == 4
    assert [c['name'] for c in written['categories']] == [str(i) for i in range(10)]
