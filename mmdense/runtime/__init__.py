"""Exported models without torch: NumPy, Pillow, pycocotools and onnxruntime."""

from mmdense.runtime.models import Classifier, Detector, Segmentor, open_model
from mmdense.runtime.session import Session

__all__ = ['Classifier', 'Detector', 'Segmentor', 'Session', 'open_model']
