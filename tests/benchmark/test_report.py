"""The report of a sweep: its content, that it needs no other file, and that labels stay apart."""

import base64
import csv
import json
import random
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from mmdense.benchmark.bootstrap import RESAMPLES, compare_rows
from mmdense.benchmark.merge import merge_sweeps
from mmdense.benchmark.plots import COLOURS, FAMILIES, Item, pareto_front, plot_scatter
from mmdense.benchmark.report import VERSION, write_report
from mmdense.errors import UserError

NAMES = ('RDNet', 'DenseNet', 'CondenseNetV2', 'ReXNet', 'ShuffleNetV2', 'timm', 'torchvision')
HOSTILE = '<script>alert("1")</script> | `x` $title'


def make_row(i=0, **changes):
    rng = random.Random(i)
    seconds = 0.01 * 1.2**i
    inference = dict(p50=seconds, p95=2 * seconds, throughput=1 / seconds, memory=6e7, ratio=1.0)
    row = dict(
        backbone=f'net-{i}',
        family=NAMES[i % len(NAMES)],
        settings=dict(epochs=9) if i == 2 else {},
        source=None,
        status='done',
        seconds=120.0 + i,
        metrics={'box AP': round(rng.uniform(0.3, 0.8), 3), 'box AP50': 0.9},
        parts=dict(
            backbone=dict(parameters=2_000_000 + i, macs=3e9, activations=5e6),
            neck=dict(parameters=500_000, macs=1e9, activations=1e6),
        ),
        infer=dict(deployed=inference, trained=dict(inference, p50=3 * seconds)),
        train=dict(p50=0.5, p95=0.6, throughput=16.0, memory=7e8 - 1e6 * i, ratio=1.0),
        losses=[[10 * k, 3.0 / k] for k in range(1, 9)],
        validations=[{'iter': 40, 'box AP': 0.1}, {'iter': 80, 'box AP': 0.3 + 0.01 * i}],
        deviations={},
        seeds=[dict(seed=0)],
        pictures=[],
    )
    return {**row, **changes}


def fail(i, error='RuntimeError: no memory'):
    nothing = dict(metrics={}, parts={}, infer={}, train=None, losses=[], validations=[])
    return make_row(i, status='failed', error=error, **nothing)


def make_results(rows, **changes):
    results = dict(
        task='detection',
        config='configs/detection/demo/faster-rcnn_x.py',
        command='python tools/benchmark.py sweep x',
        schedule='8 epochs',
        data='data/digits',
        pretrained=False,
        frozen=False,
        seeds=[0],
        version=VERSION,
        rule=None,
        columns=[],
        commit='0123456789abcdef',
        changes={'train_cfg.max_epochs': '2'},
        data_sets=dict(
            train=dict(type='CocoDataset', images=9, annotations='a.json', sha256='f' * 64)
        ),
        metrics=['box AP', 'box AP50'],
        machine=dict(
            date='2026-11-21',
            device='a CPU',
            versions=dict(torch='2.15.0'),
            omp_wait_policy='passive',
        ),
        measured=dict(
            size=[192, 160],
            test_size=[192, 160],
            batch=4,
            precision='fp32',
            compiled=True,
            train_batch=8,
            rounds=30,
            device='cpu',
            channels_last=True,
            forms=['deployed', 'trained'],
        ),
        rows=rows,
        published=[],
        truth=[],
        legend={},
    )
    return {**results, **changes}


class Page(HTMLParser):
    """A page's tags with attributes, the cells of its rows, and its text without scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.text, self.inside = [], [], '', []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'img', 'wbr'):
            self.inside.append(tag)
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if self.inside and self.inside[-1] in ('script', 'style', 'title'):
            return
        self.text += data
        if {'td', 'th'} & set(self.inside):
            self.rows[-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(tmp_path):
    """Write the report of results; return the page, its HTML, and the Markdown."""

    def write(rows, **changes):
        (tmp_path / 'results.json').write_text(json.dumps(make_results(rows, **changes)))
        write_report(tmp_path)
        text = (tmp_path / 'report.html').read_text(encoding='utf-8')
        return Page(text), text, (tmp_path / 'report.md').read_text(encoding='utf-8')

    return write


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_no_winner_where_nothing_was_learned(report):
    rows = [make_row(i, metrics={'box AP': ap}) for i, ap in enumerate((0.001, 0.005))]
    page, _, _ = report(rows)
    assert 'No backbone has learned the task yet: the best box AP is 0.005. Train' in page.text
    assert 'Best box AP' not in page.text
    assert 'Fastest inference: net-0' in page.text


def test_plots_compare_backbones_in_the_same_form(report):
    rows = [make_row(i) for i in range(2)]
    for median, figures in (('12.0', {}), ('36.0', dict(deployed=None))):
        rows[0]['infer'] = {k: v for k, v in rows[0]['infer'].items() if k not in figures}
        page, text, markdown = report(rows)
        form = 'trained' if figures else 'deployed'
        assert f'both forms of the backbones; plots show the {form} one' in ' '.join(text.split())
        assert f'median latency of 1 image (ms) {median}</title>' in text
        (head,) = [line for line in markdown.splitlines() if line.startswith('| backbone')]
        assert ('as trained, p95' in head, 'deployed, p95' in head) == (bool(figures), not figures)
        assert 'deployed, median (ms)' in head


def test_the_least_value_is_best_if_the_rule_says_so(report):
    rows = [make_row(i, metrics={'box AP': value}) for i, value in enumerate((0.5, 0.2))]
    for rule, best in (('less', 'net-1'), (None, 'net-0')):
        markdown = report(rows, metrics=['box AP'], rule=rule)[2]
        assert re.findall(r'^\| (net-\d)', markdown, re.MULTILINE)[0] == best


def test_the_report(report, tmp_path):
    """Three trained backbones and one that failed, with pictures."""
    (tmp_path / 'pictures').mkdir()
    cv2.imwrite(str(tmp_path / 'pictures/a.jpg'), np.full((600, 900, 3), 99, np.uint8))
    rows = [make_row(i, metrics={'box AP': ap}) for i, ap in enumerate((0.5, 0.7, 0.6))]
    rows[0]['pictures'] = ['pictures/a.jpg', 'pictures/gone.jpg']
    truth = dict(truth=['pictures/a.jpg'] * 2, legend={'sky <b>': [9, 8, 7]})
    page, text, markdown = report([*rows, fail(3)], **truth)
    assert 'fill="rgb(9 8 7)"/></svg>sky &lt;b&gt;</li>' in text

    # The page needs nothing else.
    assert '//' not in re.sub(r'data:image/jpeg;base64,[\w+/=]+|\n *// .*', '', text)
    assert not {'link', 'iframe', 'object', 'base'} & {tag for tag, _ in page.tags}
    (policy,) = [m['content'] for m in page.of('meta') if 'http-equiv' in m]
    assert policy.startswith("default-src 'none'; img-src data:;")
    images = page.of('img')
    names = ['truth, image 1', 'net-0, image 1', 'truth, image 2']
    assert [image['alt'] for image in images] == names
    for image in images:
        head, _, data = image['src'].partition(',')
        assert head == 'data:image/jpeg;base64'
        picture = np.frombuffer(base64.b64decode(data), np.uint8)
        assert cv2.imdecode(picture, 1).shape == (213, 320, 3), 'pictures are scaled down'
    ids = [attributes['id'] for _, attributes in page.tags if 'id' in attributes]
    assert len(ids) == len({*ids})

    # The table: the best backbone first, each heading a button, the best value of a column bold.
    (head,) = [row for row in page.rows if 'medianms' in [''.join(c.split()) for c in row]]
    head = [' '.join(cell.split()) for cell in head]
    assert head[0] == 'box AP', 'box AP50 has no values'
    body = [row for row in page.rows if row and row[0].strip().startswith('net-')]
    assert [row[0].strip() for row in body] == ['net-1', 'net-2', 'net-0', 'net-3']
    assert body[0][1] == '0.700'
    assert body[3][1:] == ['failed: RuntimeError: no memory']
    (order,) = [th for th in page.of('th') if 'aria-sort' in th]
    assert (order['aria-sort'], order['data-column']) == ('descending', '1')
    headings = text[text.index('<table id="results">') : text.index('<tbody>')]
    assert headings.count('<button type="button">') == len(head) + 1
    best = re.findall(r'<td class="best" data-value="([^"]+)">', text)
    assert best == ['0.7', '698', '10', '20', '100', '30', '2.5'], 'equal values are not marked'
    lines = [re.sub(' +', ' ', line) for line in markdown.splitlines()]
    assert any(line.startswith('| net-1 | 0.700 | 12.0 |') for line in lines)
    assert any(line.startswith('| net-3 (failed: RuntimeError: no memory) | – |') for line in lines)

    # Plots: what belongs to a backbone has its number, and a tooltip.
    assert len(page.of('figure')) == 6
    assert text.count('<title>net-1 (DenseNet): box AP 0.700, MACs (G) 4.00</title>') == 2
    pictures = re.findall(r'\((pictures/\w+\.png)\)', markdown)
    assert len(pictures) == 4
    for file in pictures:
        picture = cv2.imread(str(tmp_path / file))
        assert (tmp_path / file).stat().st_size < 100_000
        assert (np.abs(picture - rgb(FAMILIES[1][0])[::-1]).max(2) < 3).sum() > 50

    # Words, the same on both pages.
    assert 'Best box AP: net-1, 0.700.' in page.text
    assert 'Fastest inference: net-0, 10.0 ms.' in page.text
    assert '4 backbones: 3 done, 1 failed.' in page.text
    for content in (' '.join(page.text.split()), markdown):
        assert 'one image of 192 x 160 pixels' in content
        assert 'in fp32, the backbone compiled. Latency' in content
        assert 'those of one test image (the first has 192 x 160 pixels), images' in content
        assert 'images per second those of 4 images at a time' in content
        assert 'A training step is forward and backward on 8 training images' in content
        assert (
            '30 rounds on cpu (of several images, as many images), weights as trained channels-last'
            in content
        )
        assert 'both forms of the backbones; plots show the deployed one.' in content
        assert 'net-2 has settings of its own: epochs=9.' in content
        assert '2026-11-21, a CPU; torch 2.15.0; OMP_WAIT_POLICY passive; commit 0123' in content
        assert 'Train data: 9 images (CocoDataset, a.json, SHA-256 ffffffffffff).' in content
        assert 'Changed in the config: train_cfg.max_epochs=2.' in content
        assert 'python tools/benchmark.py sweep x' in content


def write_matches(folder, name, ap, images=9):
    """``ap`` is one number, or one with a standard deviation."""
    mean, deviation = ap if isinstance(ap, tuple) else (ap, 0.01)
    values = np.random.default_rng(5).normal(mean, deviation, 1 + RESAMPLES)
    values[0] = mean
    arrays = {'box AP/ap': values, 'box AP/images': np.arange(images)}
    np.savez(folder / f'{name}.npz', **arrays)
    return dict(seed=0, matches=f'{name}.npz')


def test_what_is_better(tmp_path):
    """The same images in a resample: their chance is no difference, but that of the seeds is."""
    rows = {
        'high': [0.52],
        'same': [0.52],
        'pair': [0.519],
        'seeds': [0.35, 0.5, 0.65],
        'same seeds': [0.35, 0.5, 0.65],
        'stable': [0.40, 0.41, 0.42],
        'none': [],
        'other': [0.1],
    }
    rows = {
        name: make_row(
            i,
            backbone=name,
            metrics={'box AP': float(np.mean(aps)) if aps else 0.2},
            seeds=[
                write_matches(tmp_path, f'{i}-{s}', ap, images=7 if name == 'other' else 9)
                for s, ap in enumerate(aps)
            ]
            or [dict(seed=0)],
        )
        for i, (name, aps) in enumerate(rows.items())
    }
    names = [*rows]
    ranked = sorted(range(len(names)), key=lambda i: -rows[names[i]]['metrics']['box AP'])
    differences = compare_rows(tmp_path, [*rows.values()], 'box AP', ranked)
    lows = {(names[i], names[j]): low for (i, j), (_, low, _) in differences.items()}
    assert len(lows) == 15, 'all pairs of six'
    better = {pair for pair, low in lows.items() if low > 0}
    assert ('high', 'pair') in better, 'on every resample'
    assert ('high', 'stable') in better
    assert lows['high', 'same'] == 0
    assert not better & {('seeds', 'same seeds'), ('high', 'seeds'), ('seeds', 'stable')}
    value, low, high = differences[3, 5]
    assert value == pytest.approx(0.09)
    # Means of three: 0.15 / sqrt(3) and 0.01 / sqrt(3) in quadrature, times 1.96.
    assert (high - low) / 2 == pytest.approx(0.17, rel=0.2)
    (tmp_path / 'results.json').write_text(json.dumps(make_results([*rows.values()])))
    write_report(tmp_path)
    text = (tmp_path / 'report.md').read_text()
    single, figures = '(single run)', '(0.0010; 0.0010 to 0.0010)'
    assert f'- high {single} is better than pair {single} {figures} and stable (' in text
    figures = '(0.0000; 0.0000 to 0.0000)'
    assert f'- high {single} is not distinguishable from same {single} {figures}, seeds (' in text
    assert '- RDNet: high (single run), 0.520 (the best of 2).\n' in text
    assert '- Backbones of 2 to 4 G MACs: high (single run), 0.520 (the best of 8).\n' in text
    assert '<h2>Differences</h2>' in (tmp_path / 'report.html').read_text()


def test_nothing_is_taken_for_markup(report):
    rows = [make_row(0, backbone=HOSTILE, family=HOSTILE), fail(1, HOSTILE)]
    page, text, markdown = report(
        rows, config=HOSTILE, command=HOSTILE, metrics=['box AP', HOSTILE], data=HOSTILE
    )
    assert len(page.of('script')) == 1
    assert page.text.count('alert("1")') > 5
    assert '$title' in page.text
    table = [line for line in markdown.splitlines() if line.startswith('|')]
    assert len({len(re.findall(r'(?<!\\)\|', line)) for line in table}) == 1
    assert all('<script>' not in line for line in markdown.splitlines() if line[:4] != '    ')


def test_the_latex_table(report, tmp_path):
    rows = [
        make_row(
            i, backbone=name, metrics={'box AP': ap, 'my_metric': 1.0}, deviations={'box AP': d}
        )
        for i, (name, ap, d) in enumerate((('a_b', 0.51, 0.012), ('50% & more~^\\{}#$', 0.6, 0.1)))
    ]
    columns = ['box_ap', 'parameters_m', 'my_metric', 'deployed_p50_ms', 'nothing']
    page, html, markdown = report(
        [*rows, fail(3)], columns=columns, metrics=['box AP', 'my_metric']
    )
    assert 'asked for, but have no values: nothing.' in ' '.join(page.text.split())
    assert '0.510 ± 0.012' in markdown
    groups = re.findall(r'colspan="1">(\w+)', html)
    assert groups == ['Accuracy', 'Model', 'Accuracy', 'Inference'], 'in the order of the columns'
    text = (tmp_path / 'results.tex').read_text()
    assert re.findall(r'\\(begin|end){(\w+)}', text) == [('begin', 'tabular'), ('end', 'tabular')]
    (spec,) = re.findall(r'begin{tabular}{(\w+)}', text)
    lines = [line for line in text.splitlines() if line.endswith(r'\\')]
    assert len(lines) == 2 + 3
    for line in lines:
        spans = [int(n) for n in re.findall(r'\\multicolumn{(\d+)}', line)]
        cells = len(re.findall(r'(?<!\\)&', line)) + 1
        assert cells + sum(spans) - len(spans) == len(spec) == 5
        assert line.count('{') == line.count('}')
    assert r'\textbf{0.600 $\pm$ 0.100} & 2.50 & 1.00 & 12.0' in text
    name = r'50\% \& more\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}\#\$'
    assert [line.split(' & ')[0] for line in lines[2:4]] == [name.split(' & ')[0], r'a\_b']
    assert not re.search(r'(?<!\\)[_#]', text.partition('toprule')[2].replace('cmidrule', ''))


def test_published_figures_are_compared_with_nothing(report, tmp_path):
    rows = [make_row(i, metrics={'box AP': 0.5 - i / 10}) for i in range(2)]
    known = dict(name='rdnet_x_coco', source='https://a/b', metrics={'box AP': 0.9})
    page, text, markdown = report(rows, published=[known], metrics=['box AP'])
    assert 'Best box AP: net-0, 0.500.' in page.text
    assert text.count('rdnet') == 2  # a line and its source
    (row,) = [row for row in page.rows if row and 'rdnet' in row[0]]
    assert (row[0].strip(), row[1]) == ('rdnet_x_coco (published)', '0.900')
    lines = [re.sub(' +', ' ', line) for line in markdown.splitlines() if line[:1] == '|']
    assert lines[-1].startswith('| rdnet_x_coco (published) | 0.900 | – |')
    assert 'rdnet_x_coco is published, on the data set that its name ends with (https' in markdown
    latex = (tmp_path / 'results.tex').read_text()
    assert '\\midrule\nrdnet\\_x\\_coco (published) & 0.900 & --' in latex
    assert r'\textbf{0.500}' in latex
    assert '% rdnet_x_coco: https://a/b\n' in latex
    *_, line = csv.DictReader((tmp_path / 'results.csv').read_text().splitlines())
    named = [line[name] for name in ('backbone', 'status', 'source', 'box_ap', 'macs_g')]
    assert named == ['rdnet_x_coco', 'published', 'https://a/b', '0.9', '']


def test_sweeps_in_one_report(tmp_path):
    (tmp_path / 'pictures').mkdir()
    folders = [tmp_path / name for name in 'abcde']
    for i, folder in enumerate(folders):
        (folder / 'pictures').mkdir(parents=True)
        (folder / 'pictures/x.jpg').write_bytes(b'')
        changes = dict(truth=['pictures/x.jpg'] if i == 0 else [])
        if i == 2:
            changes['measured'] = dict(make_results([])['measured'], rounds=3)
        if i == 3:
            changes['schedule'] = '9 epochs'
        if i == 4:
            changes['version'] = 1
        row = make_row(i, pictures=['pictures/x.jpg'], metrics={'box AP': 0.1 * i})
        row['seeds'] = [write_matches(folder, f'm{i}', 0.1 * i)]
        (folder / 'results.json').write_text(json.dumps(make_results([row], **changes)))
    a, b, c, d, e = folders
    merge_sweeps([a, b], tmp_path / 'ab')
    merged = json.loads((tmp_path / 'ab/results.json').read_text())
    assert [row['backbone'] for row in merged['rows']] == ['net-0', 'net-1']
    assert merged['rows'][1]['infer']['deployed']['p50'] == 0.012
    assert (tmp_path / 'ab/pictures/x.jpg').exists()
    assert 'net-1 (single run) is better than net-0' in (tmp_path / 'ab/report.md').read_text()
    assert '| net-1 | 0.100 |' in re.sub(' +', ' ', (tmp_path / 'ab/report.md').read_text())
    merge_sweeps([a, c], tmp_path / 'ac')  # measured in other ways
    merged = json.loads((tmp_path / 'ac/results.json').read_text())
    assert [row['infer'] for row in merged['rows']] == [{}, {}]
    for folders, message in (
        ([a, d], "its schedule is '9 epochs', not '8 epochs'"),
        ([a, a], 'net-0 is in two sweeps'),
        ([a, tmp_path], 'not the folder of a sweep'),
        ([a, e], 'by another version'),
    ):
        with pytest.raises(UserError, match=message):
            merge_sweeps(folders, tmp_path / 'x')


UNMEASURED = dict(infer={}, train=None, parts={})
PERCENT = [make_row(i, metrics={'mIoU (%)': 89.47 - i}, validations=[]) for i in range(2)]


@pytest.mark.parametrize(
    ('rows', 'changes', 'sentence', 'figures'),
    [
        ([fail(0), fail(1)], {}, 'Nothing to plot yet', 0),
        ([make_row(**UNMEASURED)], dict(measured=None), 'Times and memory were not measured', 2),
        ([make_row(0, train=None), make_row(1, infer={})], {}, 'Best box AP', 6),
        ([make_row(metrics={'box AP': float('nan')}), make_row(1)], {}, '2 done', 6),
        ([make_row(losses=[[10, float('nan')], [20, None]])], {}, '1 backbone: 1 done.', 5),
        ([make_row(status='waiting'), make_row(1, status='training')], {}, 'Nothing to plot', 2),
        ([make_row(i, metrics={'box AP': 0.0}, parts={}) for i in range(3)], {}, '3 done', 4),
        (PERCENT, dict(metrics=['mIoU (%)']), 'Best mIoU: net-0, 89.5 %.', 5),
    ],
)
def test_incomplete_results(report, rows, changes, sentence, figures):
    page, text, markdown = report(rows, **changes)
    assert sentence in page.text
    assert len(page.of('figure')) == figures
    names = [row for row in page.rows if row and row[0].strip().startswith('net-')]
    assert len(names) >= len(rows)
    assert 'nan' not in markdown
    assert 'nan' not in re.sub(r'<script>.*</script>', '', text, flags=re.DOTALL)


def test_the_csv_file(report, tmp_path):
    report([make_row(0, metrics={'box AP': 0.5}), fail(1, 'no, really')])
    good, bad = csv.DictReader((tmp_path / 'results.csv').read_text().splitlines())
    expected = dict(
        backbone='net-0',
        family='RDNet',
        status='done',
        box_ap='0.5',
        box_ap50='',
        deployed_p50_ms='10',
        deployed_memory_mb='60',
        train_memory_mb='700',
        parameters_m='2.5',
        macs_g='4',
        training_min='2',
    )
    assert {name: good[name] for name in expected} == expected
    assert (bad['status'], bad['error'], bad['deployed_p50_ms']) == ('failed', 'no, really', '')


@pytest.mark.parametrize('seed', range(2))
def test_labels_stay_apart(seed):
    rng = random.Random(seed)
    items = [
        Item(i, 'net-' + 'x' * rng.randrange(9), i, [(1.2**i, rng.uniform(0.3, 0.8))], '')
        for i in range(14)
    ]
    figure = plot_scatter(items, x_title='cost', y_title='accuracy')
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 14
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)


def test_the_pareto_front():
    rng = random.Random(0)
    points = [(rng.randrange(20), rng.randrange(20)) for _ in range(60)]
    front = pareto_front(points)
    assert [points[i] for i in front] == sorted({points[i] for i in front})

    def is_dominated(x, y):
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)

    assert {points[i] for i in front} == {p for p in points if not is_dominated(*p)}


@pytest.mark.parametrize('mode', [0, 1], ids=['light', 'dark'])
def test_contrast(mode):
    """Of texts and families to the paper, as WCAG 2 defines it."""
    pairs = [*(COLOURS[name] for name in ('paper', 'ink', 'soft', 'bad')), *FAMILIES]
    values = np.array([rgb(pair[mode]) for pair in pairs]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    paper, *others = linear @ (0.2126, 0.7152, 0.0722) + 0.05
    contrasts = [max(paper, light) / min(paper, light) for light in others]
    assert min(contrasts[:3]) > 4.5
    assert min(contrasts) > 3.5
