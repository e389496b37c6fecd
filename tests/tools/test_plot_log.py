"""tools/plot_log.py: the plot and the table of several runs."""

import sys

import pytest

from support import ROOT, write_log


@pytest.fixture
def work_dirs(tmp_path):
    """Three work dirs: two detectors of the same name, and a segmentor without validation."""
    detection = [{'loss': 2.0, 'step': 5}, {'loss': 1.0, 'step': 10}]
    scores = [{'coco/bbox_mAP': 0.5, 'step': 1}, {'loss': 0.5, 'step': 15}]
    records = {
        'one/det[1]': [*detection, *scores, {'coco/bbox_mAP': 0.25, 'step': 2}],
        'two/det[1]': [*detection, {'coco/bbox_mAP': 0.125, 'step': 1}],
        'seg': [{'loss': 4.0, 'step': 50}],
    }
    for name, lines in records.items():
        write_log(tmp_path / name, lines)
    return [tmp_path / name for name in records]


def rows(output):
    """Return the cells of a table's lines."""
    lines = [line.split('│')[1:-1] for line in output.splitlines() if line.startswith('│')]
    return [[cell.strip() for cell in line] for line in lines]


def test_plot_and_table_of_runs(work_dirs, call_tool, tmp_path):
    status, output, _ = call_tool('plot_log', *work_dirs, '--out', tmp_path / 'runs.png')
    assert status == 0
    assert rows(output) == [
        ['loss', 'one/det[1]', '0.5', '15', '0.5', '15'],
        ['loss', 'two/det[1]', '1', '10', '1', '10'],
        ['loss', 'seg', '4', '50', '4', '50'],
        ['box AP', 'one/det[1]', '0.25', '15', '0.5', '10'],
        ['box AP', 'two/det[1]', '0.125', '10', '0.125', '10'],
        ['box AP', 'seg', '-', '', '-', ''],
    ]
    assert (tmp_path / 'runs.png').read_bytes().startswith(b'\x89PNG')
    assert output.splitlines()[-1] == f'plot: {tmp_path / "runs.png"}'


@pytest.mark.slow
def test_an_error_is_one_line(work_dirs, run_tool, tmp_path):
    empty = tmp_path / 'empty'
    status, output = run_tool(sys.executable, ROOT / 'tools/plot_log.py', work_dirs[0], empty)
    assert status == 2
    line = f'error: no training log in {empty}: train first, or pass its --work-dir'
    assert output.splitlines()[-1] == line  # torch 2.4 warns before it
    assert 'Traceback' not in output
    assert output.count('error:') == 1
