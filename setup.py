"""Package metadata of mmdense."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Two distributions provide the packages mmengine, mmcv, mmdet and mmseg. Installing both breaks
# them, so neither is a hard dependency: an extra selects one. mmdense.runtime needs no torch.
# An older timm leaves a norm without gradient in ConvNeXt backbones, and can't prune MaxViT.
TORCH = ['torch>=2.4', 'torchvision', 'timm>=1.0.31', 'safetensors']
MM = [
    *TORCH,
    'onedl-mmengine>=0.10.10',
    'onedl-mmcv>=2.3.2',
    'onedl-mmdetection>=3.4',
    'onedl-mmsegmentation>=1.3',
]
OPENMMLAB = [
    *TORCH,
    'mmengine>=0.10.4',
    'mmcv-lite>=2.1,<2.2',
    'mmdet>=3.3,<3.4',
    'mmsegmentation>=1.2,<1.3',
    # mmsegmentation and mmengine import these without declaring them.
    'ftfy',
    'regex',
    'setuptools<82',
]
# mmpretrain of either distribution, and what it imports without declaring it.
CLASSIFICATION = ['onedl-mmpretrain>=1.3', 'markdown']
CLASSIFICATION_OPENMMLAB = ['mmpretrain>=1.2,<1.3', 'markdown']
REPORT = ['matplotlib', 'adjustText>=1.1', 'jinja2', 'tabulate']
DEMO = [*REPORT, 'scikit-learn>=1.3', 'pillow>=9.1', 'rich']
RUNTIME = ['numpy', 'onnxruntime>=1.20', 'pillow>=10.1', 'pycocotools']
ONNX = ['onnx>=1.18', 'onnxscript>=0.7', 'onnxruntime>=1.20']
JOBS = ['submitit>=1.5']
OPENVINO = [*RUNTIME, 'openvino>=2025']
TEST = [*DEMO, *ONNX, *JOBS, *OPENVINO, 'pytest>=8', 'pytest-xdist>=3.6']

setup(
    name='mmdense',
    version=re.search(r"__version__ = '(.+)'", (ROOT / 'mmdense/__init__.py').read_text())[1],
    description='RDNet, DenseNet, ReXNet for MMDetection and MMSegmentation, without a compiler',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    # An editable install is then a plain path, so that a folder named mmdense in the working
    # directory, such as the checkout's own seen from its parent, doesn't hide the package.
    package_dir={'': '.'},
    packages=find_packages(include=['mmdense', 'mmdense.*']),
    package_data={
        '': ['*.yml', 'templates/*.jinja'],
        # mim's conventions; the folder links to the checkout's.
        'mmdense': [f'.mim/**/*.{suffix}' for suffix in ('md', 'py', 'sh', 'yml')],
    },
    python_requires='>=3.10',
    extras_require={
        'mm': MM,
        'openmmlab': OPENMMLAB,
        'classification': CLASSIFICATION,
        'classification-openmmlab': CLASSIFICATION_OPENMMLAB,
        'demo': DEMO,
        'jobs': JOBS,
        'onnx': ONNX,
        'runtime': RUNTIME,
        'openvino': OPENVINO,
        'test': TEST,
        'dev': [*TEST, 'ruff'],
    },
)
