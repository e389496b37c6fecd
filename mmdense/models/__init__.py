"""Networks. Importing this package registers them and applies :mod:`mmdense.patches`."""

from mmdense import registry  # noqa: F401  (raises if the MM packages are missing)
from mmdense.patches import apply_patches

apply_patches()  # first, since OpenCV reads its limit on import

from mmdense.models.backbones import *  # noqa: E402, F403
from mmdense.models.backbones import __all__  # noqa: E402, F401
