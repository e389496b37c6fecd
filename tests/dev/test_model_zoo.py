"""The model zoo's pages, as they are written from metafiles and published figures."""

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import yaml

from support import ROOT

TOOL = ROOT / 'dev/docs/model_zoo.py'


@pytest.fixture(scope='module')
def tool():
    spec = spec_from_file_location('model_zoo', TOOL)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def pages(tool):
    return dict(tool.files())


def rows(page, name):
    """Return the table rows of a config as dicts of cells by title."""
    found, titles = [], []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')] if line[:1] == '|' else []
        if not cells:
            titles = []
        elif not titles:
            titles = cells
        elif re.search(rf'[(/]{re.escape(name)}\.py\)', cells[0]):
            found.append(dict(zip(titles, cells, strict=True)))
    return found


def test_pages_are_fresh():
    done = subprocess.run([sys.executable, TOOL, '--check'])
    assert done.returncode == 0


def test_check_finds_what_is_stale(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(tool, 'files', lambda: iter([('a.md', 'new'), ('b.md', 'same')]))
    monkeypatch.setattr(sys, 'argv', ['model_zoo.py', '--check'])
    (tmp_path / 'b.md').write_text('same')
    with pytest.raises(SystemExit, match='stale: a.md; run python dev/docs/model_zoo.py'):
        tool.main()
    assert not (tmp_path / 'a.md').exists()
    monkeypatch.setattr(sys, 'argv', ['model_zoo.py'])
    tool.main()
    assert (tmp_path / 'a.md').read_text() == 'new'


def test_every_recipe_has_a_row_in_the_zoo_and_in_its_folder(pages):
    recipes = [
        path for path in ROOT.glob('configs/*/*/*.py') if path.parent.name not in ('_base_', 'demo')
    ]
    assert {f'{path.parent.relative_to(ROOT)}/README.md' for path in recipes} == set(pages) - {
        'docs/model_zoo.md'
    }
    for path in recipes:
        assert len(rows(pages['docs/model_zoo.md'], path.stem)) == 1
        assert len(rows(pages[f'{path.parent.relative_to(ROOT)}/README.md'], path.stem)) == 1


def test_links_between_files_lead_somewhere(pages):
    for page, text in pages.items():
        for target, part in re.findall(r'\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)', text):
            file = (ROOT / page).parent / target
            assert file.is_file() or str(file.resolve().relative_to(ROOT)) in pages
            headings = re.findall(r'^#+ (.+)$', file.read_text(), re.MULTILINE) if part else []
            assert not part or part in [h.lower().replace(' ', '-') for h in headings]


def test_published_results_are_marked_as_such(pages):
    published = yaml.safe_load((ROOT / 'mmdense/benchmark/published.yml').read_text())['RDNet'][
        'detection'
    ]
    name = 'cascade-mask-rcnn_rdnet-s_fpn_amp-ms-crop-3x_coco'
    (row,) = rows(pages['configs/detection/rdnet/README.md'], name)
    assert row['published box AP'] == f'[52.3]({published["source"]})'
    assert row['published mask AP'] == f'[45.4]({published["source"]})'
    assert row['head'] == 'Cascade Mask R-CNN'
    assert row['schedule'] == '3x, multi-scale, crops, AMP'
    assert row['top-1'] == '[83.7](https://github.com/naver-ai/rdnet#model-zoo)'
    assert row['ImageNet weights'].endswith('https://huggingface.co/timm/rdnet_small.nv_in1k)')
    (row,) = rows(pages['configs/detection/rdnet/README.md'], name.replace('-s', '-l'))
    assert row['published box AP'] == row['published mask AP'] == '`not run`'
    (row,) = rows(pages['configs/detection/rdnet/README.md'], 'retinanet_rdnet-s_fpn_1x_coco')
    assert row['published mask AP'] == ''
    for text in pages.values():
        titles = {
            title.strip()
            for line in text.splitlines()
            if re.search(r'\| --', line) is None
            for title in line.split('|')[1:-1]
            if re.search(r'AP|mIoU|RMSE', title)
        }
        assert titles
        assert all(title.startswith('published ') for title in titles)


def test_wrong_published_costs_are_left_out(pages):
    part = yaml.safe_load((ROOT / 'mmdense/benchmark/published.yml').read_text())['RDNet'][
        'segmentation'
    ]
    for page in ('docs/model_zoo.md', 'configs/segmentation/rdnet/README.md'):
        for wrong in part['rows']:
            assert set(wrong['why']) == {'params', 'macs'}
            (row,) = rows(pages[page], wrong['config'])
            assert float(row['params (M)']) != wrong['params']
            assert float(row['GMACs']) != wrong['macs']
        names = ', '.join(f'UperNet RDNet-{size}' for size in 'TSB')
        assert f'other parameters and multiply-adds of {names}, left out here' in pages[page]
    assert 'left out here' not in pages['configs/segmentation/densenet/README.md']


def test_commands_name_configs_that_are_there(pages):
    for page, text in pages.items():
        if page.endswith('README.md'):
            (config,) = re.findall('^CONFIG=(.+)$', text, re.MULTILINE)
            assert (ROOT / config).parent == (ROOT / page).parent
            assert (ROOT / config).is_file()
