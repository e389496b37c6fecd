"""The checks and timings of a GPU: parts that fail alone, and a dry run of the script."""

import json
import os
import sys
import time

import pytest
import torch

from dev.benchmark import gpu
from dev.benchmark.__main__ import main
from dev.benchmark.compare import Contender, Setting
from dev.benchmark.gpu import PARTS, Part, run_parts
from dev.benchmark.side_by_side import compare_side_by_side
from support import ROOT


def python(text):
    return [sys.executable, '-c', text]


def test_a_part_that_fails_leaves_the_others(tmp_path):
    rows, results = {}, dict(results=[dict(setting=1)])
    parts = [
        Part('time', python('print("slow")'), 60, is_check=False),
        Part('good', python(f'open("good.json", "w").write({json.dumps(results)!r})'), 60),
        Part(
            'bad', python('print("\\n".join(map(str, range(30))));' + 1 * 'raise SystemExit(3)'), 60
        ),
        # Ends with its own processes.
        Part('late', python('import os, time; print(os.fork(), flush=True); time.sleep(60)'), 2),
        Part('never', ['no-such-program'], 60),
    ]
    order = []
    run_parts(
        parts,
        tmp_path,
        end=time.monotonic() + 60,
        dry=True,
        save=lambda row: (order.append(row['name']), rows.update({row['name']: row})),
    )
    assert order == ['good', 'bad', 'late', 'never', 'time']  # checks first
    status = {name: row['status'] for name, row in rows.items()}
    assert status == dict(good='ok', bad='failed', late='timeout', never='failed', time='ok')
    assert rows['bad']['tail'] == [str(i) for i in range(10, 30)]
    assert rows['good']['results'] == results['results']
    assert 2 < rows['late']['seconds'] < 20
    child = max(map(int, rows['late']['tail']))
    end = time.monotonic() + 20
    while os.path.exists(f'/proc/{child}'):
        assert time.monotonic() < end
    assert 'no-such-program' in rows['never']['tail'][-1]
    run_parts(
        parts[:2], tmp_path, end=0, dry=True, save=lambda row: rows.update({row['name']: row})
    )
    assert rows['good']['status'] == rows['time']['status'] == 'skipped'


def test_settings():
    settings = gpu.timings(dry=False)
    assert {(s.mode, s.size, s.batch) for s in settings} == {row[:3] for row in gpu.SETTINGS}
    for setting, contenders in settings.items():
        libraries = {c.library for c in contenders if c.compiled}
        assert libraries == ({'mmdense', 'timm'} if setting.network in gpu.COMPILED else set())
        assert any(c.graph for c in contenders) == (setting.batch == 1)
        assert all(c.channels_last for c in contenders)
    assert all(s.device == 'cpu' and s.size == gpu.TINY for s in gpu.timings(dry=True))


@pytest.mark.slow
def test_who_is_not_ready_in_time_has_failed():
    setting = Setting('rexnet_100', size=(32, 32), batch=2)
    contenders = [Contender('nobody'), Contender('mmdense'), Contender('timm')]
    (result,) = compare_side_by_side({setting: contenders}, rounds=2, patience=100)
    assert result['rounds'] == 2
    assert result['contenders']['timm']['ratio'] == 1
    assert {'error', 'ratio'} < result['contenders']['mmdense'].keys()
    assert result['contenders']['nobody'] == dict(failed="KeyError: 'nobody'")
    assert not [*compare_side_by_side({setting: contenders}, rounds=2, patience=0)]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [([], 'torch finds no GPU: --dry runs the same parts'), (['--dry'], '--dry needs --json FILE')],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as error:
        main(['gpu', *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_form_of_ours_that_fails_is_a_failed_check(tmp_path, monkeypatch, capsys):
    rows = dict(mmdense=dict(failed='RuntimeError: no'), timm=dict(failed='RuntimeError: theirs'))
    result = dict(setting=dict(network='rdnet_tiny'), contenders=rows)
    monkeypatch.setattr('dev.benchmark.__main__.compare_side_by_side', lambda *_, **__: [result])
    monkeypatch.setattr('dev.benchmark.__main__.markdown', lambda records: '###')
    with pytest.raises(SystemExit):
        main(['gpu', '--dry', '--until', '1', '--json', str(tmp_path / 'x')])
    assert capsys.readouterr().err == 'error: rdnet_tiny, mmdense: RuntimeError: no\n'


@pytest.mark.slow
def test_dry_run(run_tool, tmp_path):
    """Without make, git and nvidia-smi."""
    file = tmp_path / 'records/gpu.json'
    for name in ('bash', 'dirname'):
        (tmp_path / name).symlink_to(f'/bin/{name}')
    script = ROOT / 'dev/benchmark/gpu.sh'
    status, output = run_tool(script, '--dry', '--json', file, PATH=str(tmp_path), COMMIT='abc')
    record = json.loads(file.read_text())
    assert [(part['name'], part['status'], part['tail'][-3:]) for part in record['parts']] == [
        (name, 'ok', part['tail'][-3:]) for name, part in zip(PARTS, record['parts'], strict=True)
    ]
    assert status == 0, output
    assert record['commit'] == 'abc'
    assert record['versions']['torch'] == torch.__version__
    modes = [result['setting']['mode'] for result in record['results']]
    assert {*modes} == {'infer', 'train'}
    assert 'recorded in' in output
