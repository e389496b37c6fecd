"""Broken images, label maps and annotations."""

import io
import json
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64
NOISE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
PIXELS = cv2.resize(NOISE, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)  # BGR
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="64"><script>1</script></svg>'
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 96 64
%%EndComments
(out) (w) file closefile
%%EOF
"""


def encode(kind='JPEG', mode='RGB', **options):
    """Return PIXELS encoded as this kind of file."""
    file = io.BytesIO()
    Image.fromarray(PIXELS[..., ::-1]).convert(mode).save(file, kind, **options)
    return file.getvalue()


def png(array):
    return cv2.imencode('.png', array)[1].tobytes()


def bomb(width, height):
    """Return a PNG of a few bytes whose header claims this many pixels."""
    parts = (
        (b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)),
        (b'IDAT', zlib.compress(bytes(1000))),
        (b'IEND', b''),
    )
    chunks = [
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def rotated():
    """Return a JPEG whose EXIF orientation makes it higher than wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(exif=exif)


INTACT, DEEP = encode(), PIXELS.astype(np.uint16) * 256 + 99
PROGRESSIVE = encode(progressive=True)
# Large enough for zeros to replace half of the file.
NOISY = cv2.imencode('.jpg', np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8))[1]
NOISY = NOISY.tobytes()
# Name -> content, (width, height) after rotation, and the kind of finding.
USABLE = {
    'intact.jpg': (INTACT, (96, 64), None),
    'progressive.jpg': (PROGRESSIVE, (96, 64), None),
    'grey.jpg': (encode(mode='L'), (96, 64), None),
    'cmyk.jpg': (encode(mode='CMYK'), (96, 64), None),
    'palette.png': (encode('PNG', 'P'), (96, 64), None),
    'padded.jpg': (INTACT + bytes(500), (96, 64), None),
    'rotated.jpg': (rotated(), (64, 96), None),
    'opaque.png': (encode('PNG', 'RGBA'), (96, 64), None),
    'clear.png': (png(np.dstack([PIXELS, PIXELS[..., 0]])), (96, 64), 'transparency'),
    'deep.png': (png(DEEP), (96, 64), 'high bit depth'),
    'deep-grey.png': (png(DEEP[..., 0]), (96, 64), 'high bit depth'),
    'deep.tif': (cv2.imencode('.tif', DEEP)[1].tobytes(), (96, 64), 'high bit depth'),
    'side-116.png': (png(cv2.resize(PIXELS, (160, 116))), (160, 116), None),
    'dot.png': (png(PIXELS[:1, :1]), (1, 1), 'extreme shape'),
    'line.png': (png(cv2.resize(PIXELS, (8000, 50))), (8000, 50), 'extreme shape'),
}
UNUSABLE = {
    'empty.jpg': (b'', 'empty file'),
    'truncated.jpg': (INTACT[: len(INTACT) // 2], 'damaged file'),
    'truncated-progressive.jpg': (PROGRESSIVE[: len(PROGRESSIVE) // 2], 'damaged file'),
    'truncated.png': (encode('PNG')[:4000], 'damaged file'),
    'zeros.jpg': (NOISY[: len(NOISY) // 2] + bytes(len(NOISY) // 2), 'damaged file'),
    'text.jpg': (b'no image at all', 'not an image'),
    'drawing.jpg': (SVG, 'not an image'),
    'postscript.jpg': (EPS, 'not an image'),
    'bomb.png': (bomb(50000, 50000), 'too many pixels'),
    'missing.jpg': (None, 'missing file'),
}


def write(folder, name, content):
    """Write a file, unless its content is None, and return its path."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        file.write_bytes(content)
    return file


def coco(images=(), annotations=(), categories=('a', 'b')):
    """Return the content of an annotation file; images are (id, name, width, height)."""
    keys = ('id', 'file_name', 'width', 'height')
    return dict(
        images=[i if isinstance(i, dict) else dict(zip(keys, i, strict=True)) for i in images],
        annotations=list(annotations),
        categories=[
            c if isinstance(c, dict) else dict(id=i + 1, name=c) for i, c in enumerate(categories)
        ],
    )


def box(number, image=1, category=1, bbox=(8, 8, 40, 30), **more):
    """Return an annotation with a polygon around its box."""
    x, y, w, h = bbox
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    known = dict(id=number, image_id=image, category_id=category, bbox=list(bbox))
    return dict(known, area=w * h, iscrowd=0, segmentation=corners) | more


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file
