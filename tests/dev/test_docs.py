"""Generated documents: up to date, complete, and with links and configs that exist."""

import re

import pytest
import yaml

from dev.docs import __main__ as command
from dev.docs.pages import compare
from support import ROOT

RECIPES = sorted(
    path for path in ROOT.glob('configs/*/*/*.py') if path.parent.name not in ('_base_', 'demo')
)
READMES = sorted({path.with_name('README.md') for path in RECIPES})
DOCUMENTS = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    *sorted(ROOT.glob('docs/*.md')),
    *READMES,
]


def rows(page, recipe):
    """Return the table rows of a recipe as dicts of cells by column title."""
    rows, titles = [], []
    for line in page.read_text(encoding='utf-8').splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')] if line[:1] == '|' else []
        if not cells or not titles:
            titles = cells
        elif re.search(rf'[(/]{re.escape(recipe)}\.py\)', cells[0]):
            rows.append(dict(zip(titles, cells, strict=True)))
    return rows


@pytest.mark.slow
def test_generated_files_are_up_to_date(capsys):
    assert command.main(['--check']) == 0, capsys.readouterr().err


def test_check_names_outdated_files_and_leaves_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, 'ROOT', tmp_path)
    monkeypatch.setattr(command, 'files', lambda: iter([('a.md', 'new'), ('b.yml', 'same')]))
    (tmp_path / 'b.yml').write_text('same')
    assert command.main(['--check']) == 1
    assert 'out of date: a.md; run python -m dev.docs' in capsys.readouterr().err
    assert not (tmp_path / 'a.md').exists()
    assert command.main([]) == 0
    assert (tmp_path / 'a.md').read_text() == 'new'


def test_a_difference_from_a_published_figure_needs_a_reason():
    assert compare('net: params', 100, 100.9, None) == '100.9 (published: 100, +0.9%)'
    assert compare('net: params', 100, 102, 'a typo') == '102 (published: 100, +2.0%)'
    assert compare('net: params', None, 98, None) == '98'
    with pytest.raises(SystemExit, match='net: params: 100 was published, 98 counted: give the re'):
        compare('net: params', 100, 98, None)


def test_every_recipe_has_one_row_in_the_zoo_and_in_the_readme_of_its_folder():
    for recipe in RECIPES:
        assert len(rows(ROOT / 'docs/model_zoo.md', recipe.stem)) == 1
        assert len(rows(recipe.with_name('README.md'), recipe.stem)) == 1


def test_every_recipe_has_one_metafile_entry():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    models = [m for file in index for m in yaml.safe_load((ROOT / file).read_text())['Models']]
    assert sorted(ROOT / model['Config'] for model in models) == RECIPES
    assert all((ROOT / model['Config']).stem == model['Name'] for model in models)


def test_published_results_are_labelled_and_linked():
    published = yaml.safe_load((ROOT / 'mmdense/benchmark/published.yml').read_text())['RDNet']
    source = published['detection']['source']
    readme = ROOT / 'configs/detection/rdnet/README.md'
    (row,) = rows(readme, 'cascade-mask-rcnn_rdnet-s_fpn_amp-ms-crop-3x_coco')
    assert row['published box AP'] == f'[52.3]({source})'
    assert row['published mask AP'] == f'[45.4]({source})'
    assert row['head'] == 'Cascade Mask R-CNN'
    assert row['schedule'] == '3x, multi-scale, crops, AMP'
    assert row['top-1'] == '[83.7](https://github.com/naver-ai/rdnet#model-zoo)'
    assert row['ImageNet weights'].endswith('https://huggingface.co/timm/rdnet_small.nv_in1k)')
    (row,) = rows(readme, 'retinanet_rdnet-s_fpn_1x_coco')
    assert row['published box AP'] == row['published mask AP'] == ''
    for page in [ROOT / 'docs/model_zoo.md', *READMES]:
        titles = {title for recipe in RECIPES for row in rows(page, recipe.stem) for title in row}
        results = [title for title in titles if re.search(r'AP|mIoU|RMSE', title)]
        assert all(title.startswith('published ') for title in results)


@pytest.mark.parametrize('page', DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r'```.*?```', '', page.read_text(encoding='utf-8'), flags=re.DOTALL)
    for target, heading in re.findall(r'\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)', text):
        file = page.parent / target if target else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r'^#+ (.+)$', file.read_text(encoding='utf-8'), re.MULTILINE)
            anchors = [re.sub(r'[^\w -]', '', t).lower().replace(' ', '-') for t in titles]
            assert heading in anchors


@pytest.mark.parametrize('page', DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_files_that_exist(page):
    blocks = re.findall(r'```\w*\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL)
    for name in re.findall(r'\b(?:configs|tools)/[\w./-]+\.(?:py|sh)\b', '\n'.join(blocks)):
        assert (ROOT / name).is_file(), name
    for module in re.findall(r'python -m (dev\.\w+)', '\n'.join(blocks)):
        assert (ROOT / module.replace('.', '/') / '__main__.py').is_file()
