"""The report of a sweep: what it says, that it needs nothing else, and that names stay apart."""

import csv
import json
import random
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from mmdense.benchmark import sweep_report
from mmdense.benchmark.drawing import FAMILIES, Box, Dot, Text, text_width
from mmdense.benchmark.sweep_report import frontier, write_report
from mmdense.errors import UserError

NAMES = ('RDNet', 'DenseNet', 'CondenseNetV2', 'ReXNet', 'ShuffleNetV2', 'timm', 'torchvision')
HOSTILE = '<script>alert("1")</script> | `x` $title'


def make_row(i=0, **changes):
    rng = random.Random(i)
    seconds = 0.01 * 1.2**i
    row = dict(
        backbone=f'net-{i}',
        family=NAMES[i % len(NAMES)],
        status='done',
        seconds=120.0 + i,
        metrics={'box AP': round(rng.uniform(0.3, 0.8), 3), 'box AP50': 0.9},
        parts=dict(
            backbone=dict(parameters=2_000_000 + i, macs=3e9, activations=5e6),
            neck=dict(parameters=500_000, macs=1e9, activations=1e6),
        ),
        form='deployed',
        infer=dict(p50=seconds, p95=2 * seconds, throughput=1 / seconds, memory=6e7, ratio=1.0),
        train=dict(p50=0.5, p95=0.6, throughput=16.0, memory=7e8 - 1e6 * i, ratio=1.0),
        losses=[[10 * k, 3.0 / k] for k in range(1, 9)],
        validations=[{'iter': 40, 'box AP': 0.1}, {'iter': 80, 'box AP': 0.3 + 0.01 * i}],
        pictures=[],
    )
    return {**row, **changes}


def fail(i, error='RuntimeError: no memory'):
    nothing = dict(metrics={}, parts={}, infer=None, train=None, losses=[], validations=[])
    return make_row(i, status='failed', error=error, **nothing)


def make_results(rows, **changes):
    results = dict(
        task='detection',
        config='configs/detection/demo/faster-rcnn_x.py',
        command='python tools/benchmark.py sweep x',
        schedule='8 epochs',
        data='data/digits',
        pretrained=False,
        metrics=['box AP', 'box AP50'],
        machine=dict(
            date='2026-11-21',
            device='a CPU',
            versions=dict(torch='2.15.0'),
            omp_wait_policy='passive',
        ),
        measured=dict(
            size=[192, 160],
            infer_batch=1,
            train_batch=8,
            rounds=30,
            device='cpu',
            channels_last=True,
        ),
        rows=rows,
        truth=[],
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


def test_the_page_needs_nothing_else(report, tmp_path):
    (tmp_path / 'pictures').mkdir()
    cv2.imwrite(str(tmp_path / 'pictures/a.jpg'), np.full((32, 32, 3), 99, np.uint8))
    rows = [make_row(0, pictures=['pictures/a.jpg', 'pictures/gone.jpg']), make_row(1)]
    page, text, _ = report(rows, truth=['pictures/a.jpg', 'pictures/a.jpg'])
    assert '//' not in re.sub(r'data:image/jpeg;base64,[\w+/=]+|\n *// .*', '', text)
    assert 'url(' not in text
    assert not {'link', 'iframe', 'object', 'base'} & {tag for tag, _ in page.tags}
    (policy,) = [m['content'] for m in page.of('meta') if 'http-equiv' in m]
    assert policy.startswith("default-src 'none'; img-src data:;")
    images = page.of('img')
    assert [image['alt'] for image in images] == [
        'truth, image 1',
        'net-0, image 1',
        'truth, image 2',
    ]
    assert all(image['src'].startswith('data:image/jpeg;base64,') for image in images)


def test_the_table(report):
    rows = [make_row(i, metrics={'box AP': ap}) for i, ap in enumerate((0.5, 0.7, 0.6))]
    page, text, markdown = report([*rows, fail(3)])
    head = [row for row in page.rows if 'median ms' in row][0]
    assert head[0] == 'box AP'  # AP50 is of none
    body = [row for row in page.rows if row and row[0].startswith('net-')][:4]
    assert [row[0] for row in body] == ['net-1', 'net-2', 'net-0', 'net-3']
    assert body[0][1] == '0.700'
    assert body[3][1:] == ['failed: RuntimeError: no memory']
    (order,) = [th for th in page.of('th') if 'aria-sort' in th]
    assert (order['aria-sort'], order['data-column']) == ('descending', '1')
    # Each heading can be pressed: by the keyboard as well.
    assert text.count('"><button type="button">', 0, text.index('<tbody>')) == len(head) + 1
    best = re.findall(r'<td class="best" data-value="([^"]+)">', text)
    assert best == ['0.7', '698', '10', '20', '100', '2.5']  # speed, for one, is the same in all
    assert '| net-1 | 0.700 | 12.0 |' in markdown
    assert '| net-3 (failed: RuntimeError: no memory) | – |' in markdown


def test_what_stands_out_is_said(report):
    rows = [make_row(i, metrics={'box AP': ap}) for i, ap in enumerate((0.5, 0.7, 0.6))]
    page, _, _ = report(rows)
    assert 'Best box AP: net-1, 0.700.' in page.text
    assert 'Fastest inference: net-0, 10.0 ms.' in page.text
    every = 'On the frontier of every plot, so that no other is both better and cheaper'
    assert f'{every}: net-1.' in page.text
    assert 'On no frontier' not in page.text  # net-0 is the fastest, net-2 takes the least memory
    assert '3 backbones: 3 done.' in page.text


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


UNMEASURED = dict(infer=None, train=None, parts={})


@pytest.mark.parametrize(
    ('rows', 'changes', 'said', 'figures'),
    [
        ([make_row()], {}, '1 backbone: 1 done.', 6),
        ([make_row(i) for i in range(20)], {}, '20 backbones: 20 done.', 6),
        ([fail(0), fail(1)], {}, 'Nothing to plot yet', 0),
        ([make_row(**UNMEASURED)], dict(measured=None), 'Times and memory were not measured', 2),
        ([make_row(i, train=None) for i in range(3)], {}, 'Best box AP', 5),
        ([make_row(infer=None), make_row(1)], {}, 'Best box AP', 6),
        ([make_row(metrics={'box AP': float('nan')}), make_row(1)], {}, '2 done', 6),
        ([make_row(losses=[[10, float('nan')], [20, None]])], {}, '1 done', 5),
        ([make_row(status='waiting'), make_row(1, status='training')], {}, 'Nothing to plot', 2),
        ([make_row(i, metrics={'box AP': 0.0}, parts={}) for i in range(3)], {}, '3 done', 4),
    ],
)
def test_whatever_is_there(report, rows, changes, said, figures):
    page, text, markdown = report(rows, **changes)
    assert said in page.text
    assert len(page.of('figure')) == figures
    assert len([row for row in page.rows if row and row[0].startswith('net-')]) >= len(rows)
    assert 'nan' not in markdown
    assert 'nan' not in re.sub(r'<script>.*</script>', '', text, flags=re.S)


def test_percent(report):
    rows = [make_row(i, metrics={'mIoU (%)': 89.47 - i}, validations=[]) for i in range(2)]
    page, _, markdown = report(rows, task='segmentation', metrics=['mIoU (%)'])
    assert '| backbone | mIoU (%) |' in markdown
    assert '| net-0 | 89.5 |' in markdown
    assert 'Best mIoU: net-0, 89.5 %.' in page.text


def test_how_it_was_measured(report):
    rows = [make_row(0), make_row(1, form='trained')]
    for text in (report(rows)[0].text, report(rows)[2]):
        assert 'one image of 192 x 160 pixels' in text
        assert 'a training step is forward and backward on 8 training images' in text
        assert '30 rounds on cpu, channels-last' in text
        assert 'Inference in deployed form: net-0.' in text
        assert 'Inference as trained: net-1.' in text
        assert '2026-11-21, a CPU; torch 2.15.0; OMP_WAIT_POLICY passive.' in text
        assert 'python tools/benchmark.py sweep x' in text


def test_the_csv_file(report, tmp_path):
    report([make_row(0, metrics={'box AP': 0.5}), fail(1, 'no, really')])
    good, bad = csv.DictReader((tmp_path / 'results.csv').read_text().splitlines())
    wanted = dict(
        backbone='net-0',
        family='RDNet',
        status='done',
        box_ap='0.5',
        box_ap50='',
        infer_p50_ms='10',
        infer_memory_mb='60',
        train_memory_mb='700',
        parameters_m='2.5',
        multiply_adds_g='4',
        neck_multiply_adds_g='1',
        training_min='2',
    )
    assert {name: good[name] for name in wanted} == wanted
    assert (bad['status'], bad['error'], bad['infer_p50_ms']) == ('failed', 'no, really', '')


def test_the_plots_of_the_markdown(report, tmp_path):
    _, _, markdown = report([make_row(0, family=NAMES[1]), make_row(1)])
    files = re.findall(r'\((pictures/\w+\.png)\)', markdown)
    assert len(files) == 4
    colour = [int(FAMILIES[0][0][i : i + 2], 16) for i in (5, 3, 1)]
    for file in files:
        picture = cv2.imread(str(tmp_path / file))
        assert (tmp_path / file).stat().st_size < 100_000
        assert (np.abs(picture - colour).max(2) < 3).sum() > 50


def test_pictures_are_modest(report, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / 'pictures').mkdir()
    names = [f'pictures/{i}.jpg' for i in range(6)]
    for name in names:
        noise = rng.integers(0, 255, (24, 24, 3)).astype(np.uint8)
        cv2.imwrite(str(tmp_path / name), cv2.resize(noise, (192, 192)))
    _, text, _ = report([make_row(i, pictures=names) for i in range(8)], truth=names)
    assert text.count('<img ') == 6 * 9
    assert len(text) < 3e6
    large = tmp_path / 'large.jpg'
    cv2.imwrite(str(large), np.zeros((600, 900, 3), np.uint8))
    data = sweep_report.base64.b64decode(sweep_report._picture(large).partition(',')[2])
    assert cv2.imdecode(np.frombuffer(data, np.uint8), 1).shape == (213, 320, 3)


def test_no_results(tmp_path):
    with pytest.raises(UserError, match='run tools/benchmark.py sweep first'):
        write_report(tmp_path)
    (tmp_path / 'results.json').write_text('{"rows"')
    with pytest.raises(UserError, match='is damaged'):
        write_report(tmp_path)


@pytest.mark.parametrize('width', sweep_report.WIDTHS.values())
def test_labels_of_a_plot_never_collide(width):
    for seed in range(3):
        rng = random.Random(seed)
        rows = [make_row(i, backbone='net-' + 'x' * rng.randrange(12)) for i in range(20)]
        results = make_results(rows)
        columns = sweep_report._columns(results)
        for plot in sweep_report._plots(results, columns):
            marks = sweep_report._scatter(results, columns[0], plot, width=width).marks
            dots = [mark.box for mark in marks if isinstance(mark, Dot)]
            labels = [m for m in marks if isinstance(m, Text) and m.row is not None]
            boxes = [
                Box(m.at.x, m.at.y - 9, m.at.x + text_width(m.text, m.kind), m.at.y + 2)
                for m in labels
            ]
            assert len(dots) == len(labels) == 20
            assert not any(a.hits(b) for i, a in enumerate(boxes) for b in boxes[:i])
            assert not any(box.hits(dot) for box in boxes for dot in dots)
            assert all(box.left >= 0 and box.right <= width for box in boxes)


def test_the_frontier():
    rng = random.Random(0)
    points = [(rng.randrange(20), rng.randrange(20)) for _ in range(60)]
    found = frontier(points)
    assert [points[i] for i in found] == sorted({points[i] for i in found})

    def is_beaten(x, y):
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)

    assert {points[i] for i in found} == {point for point in points if not is_beaten(*point)}
