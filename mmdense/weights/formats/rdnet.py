"""RDNet: timm's and the authors' classifiers, feature extractors, and the released detectors."""

from mmdense.weights.formats.format import AFFINE, Format

BLOCK = rf'dense_block\d+\.(?:gamma|layers\.layers\.(?:[0124]|5\.fc)\.{AFFINE})'
# Feature extractors flatten the outermost modules: stem_0, dense_stages_0. The released detectors
# wrap one as timm_model.
OUTER = r'(?:timm_model\.)?'
RULES = (
    (rf'{OUTER}stem[._](?:stem[._])?([01]\.{AFFINE})', r'stem.\1'),
    (
        rf'{OUTER}dense_stages[._](0\.0\.{BLOCK}|[1-9]\d*\.(?:[01]\.{AFFINE}|2\.{BLOCK}))',
        r'dense_stages.\1',
    ),
    (rf'(?:norm_modules|output_norms)\.(\d+\.{AFFINE})', r'output_norms.\1'),
)
RDNET = Format(
    name='rdnet',
    about="RDNet: timm's and NAVER's classifiers, timm's feature extractors",
    sign=rf'{OUTER}dense_stages[._]\d',
    rules=RULES,
    classifier=(
        (rf'{OUTER}head\.norm\.({AFFINE})', r'neck.norm.\1'),
        (rf'{OUTER}head\.fc\.({AFFINE})', r'head.fc.\1'),
    ),
)
# Necks and heads have the same names in mmdet 2 and 3, and in mmseg 0 and 1. mmcv's EMAHook saves
# the weights that the average replaced as ema_...
PARTS = r'(?:neck|rpn_head|roi_head|bbox_head|mask_head|decode_head|auxiliary_head)'
MMLAB = Format(
    name='rdnet-mmlab',
    about='RDNet: detectors of mmdet 2.x and segmentors of mmseg 0.x',
    sign=r'backbone\.timm_model\.(?:stem|dense_stages)[._]',
    rules=(
        *((rf'backbone\.{key}', f'backbone.{target}') for key, target in RULES),
        (rf'{PARTS}\..+', r'\g<0>'),
        (rf'backbone\.{OUTER}head\..+|ema_\w+', None),
    ),
)
