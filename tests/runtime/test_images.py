"""Images of all kinds: found, read and resized."""

import cv2
import mmcv
import numpy as np
import pytest
import torch
from torch.nn import functional

from bad_data import UNUSABLE, USABLE, write
from mmdense.errors import UserError
from mmdense.runtime.images import (
    crop_center,
    find_images,
    interpolate,
    positions,
    read_image,
    resize,
    scaled_size,
)

SIZES = [(480, 640), (100, 300), (7, 5), (1, 9)]


# Reading and resizing


@pytest.mark.parametrize('name', USABLE)
def test_pixels_are_those_of_mmcv(name, tmp_path):
    file = write(tmp_path, name, USABLE[name][0])
    pixels, expected = read_image(file), mmcv.imread(file)[..., ::-1]
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    # OpenCV rounds CMYK, and 16-bit TIFF, in its own way.
    assert np.abs(pixels.astype(int) - expected).max() <= name.startswith(('cmyk', 'deep.tif'))


@pytest.mark.parametrize('name', UNUSABLE)
def test_files_that_cannot_be_read(name, tmp_path):
    content, kind = UNUSABLE[name]
    file = write(tmp_path, name, content)
    words = {'missing file': 'no such image', 'too many pixels': 'exceeds limit of 178956970'}
    with pytest.raises(UserError, match=words.get(kind, kind.removesuffix(' file'))) as error:
        read_image(file)
    assert str(error.value).startswith(f'{file}: ')
    assert '\n' not in str(error.value)


def test_arrays_must_be_images():
    image = np.zeros((4, 5, 3), np.uint8)
    assert read_image(image) is image
    for array in (image[..., 0], image / 255, image[:0]):
        with pytest.raises(UserError, match=r'must be uint8 \[H, W, 3\] in RGB, not '):
            read_image(array)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('original', SIZES)
def test_resized_images_are_opencv_s(original, size):
    image = np.random.default_rng(0).integers(0, 256, (*original, 3), np.uint8)
    expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR).astype(int)
    assert np.abs(resize(image, size) - expected).max() <= 1  # 0 on x86; others round differently


@pytest.mark.parametrize('original', SIZES)
@pytest.mark.parametrize('keep_ratio', [True, False])
def test_sizes_are_those_of_mmcv(original, keep_ratio):
    image, scale = np.zeros((*original, 3), np.uint8), (192, 128)
    expected = mmcv.imrescale(image, scale) if keep_ratio else mmcv.imresize(image, scale)
    assert scaled_size(*original, scale, keep_ratio) == expected.shape[:2]


@pytest.mark.parametrize('edge', ['short', 'long', 'width', 'height'])
@pytest.mark.parametrize('original', [(60, 45), (45, 61), (50, 50)])
def test_classifiers_read_the_pixels_of_mmpretrain(original, edge):
    transforms = pytest.importorskip('mmpretrain.datasets.transforms')
    image = np.random.default_rng(0).integers(0, 256, (*original, 3), np.uint8)
    settings = dict(scale=39, edge=edge, backend='pillow', interpolation='bicubic')
    expected = transforms.ResizeEdge(**settings)(dict(img=image))
    expected = mmcv.transforms.CenterCrop((40, 32))(expected)['img']
    resized = resize(image, scaled_size(*original, 39, edge=edge), 'bicubic')
    np.testing.assert_array_equal(crop_center(resized, (40, 32)), expected)


@pytest.mark.parametrize('align_corners', [True, False])
def test_interpolation_is_that_of_torch(align_corners):
    values = torch.rand(2, 5, 7)
    for size in ((11, 3), (5, 7), (1, 1)):
        expected = functional.interpolate(
            values[None], size, mode='bilinear', align_corners=align_corners
        )[0]
        y, x = (
            positions(*sides, align_corners=align_corners)
            for sides in zip((5, 7), size, strict=True)
        )
        np.testing.assert_allclose(interpolate(values.numpy(), y, x), expected, atol=1e-5)


# Folders


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders_are_searched_in_order(tmp_path):
    touch(tmp_path, 'in/b.JPG', 'in/a.png', 'in/sub/c.tif', 'in/notes.txt', 'in/.d.jpg')
    touch(tmp_path, 'in/.cache/e.jpg', 'in/out/pictures/f.jpg', 'odd.name')
    folder, out = tmp_path / 'in', tmp_path / 'in/out'
    pictures = out / 'pictures'
    assert list(find_images([folder], out).items()) == [
        (folder / 'a.png', pictures / 'a.png'),
        (folder / 'b.JPG', pictures / 'b.JPG'),
        (folder / 'sub/c.tif', pictures / 'sub/c.tif.png'),
    ]
    # A file is taken whatever its name, and once.
    found = find_images([tmp_path / 'odd.name', folder, folder / 'a.png'], out)
    names = ['odd.name.png', 'in/a.png', 'in/b.JPG', 'in/sub/c.tif.png']
    assert list(found.values()) == [pictures / name for name in names]


def test_folders_are_searched_through_links(tmp_path):
    touch(tmp_path, 'in/a.jpg', 'elsewhere/b.jpg')
    (tmp_path / 'in/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere/up').symlink_to(tmp_path / 'in')  # a circle
    found = find_images([tmp_path / 'in'], tmp_path / 'out')
    assert [file.relative_to(tmp_path / 'in').as_posix() for file in found] == [
        'a.jpg',
        'link/b.jpg',
    ]


def test_images_of_one_name_get_different_pictures(tmp_path, monkeypatch):
    touch(tmp_path, 'a/x.jpg', 'b/x.jpg', 'c/x.bmp', 'c/x.bmp.png', 'c/x.png')
    names = ['a/x.jpg', 'b/x.jpg', 'c/x.bmp.png', 'c/x.bmp_.png', 'c/x.png']
    sources = ['b/x.jpg', 'a', str(tmp_path / 'a/x.jpg'), 'c']
    monkeypatch.chdir(tmp_path)
    found = find_images(sources, 'out')
    assert sorted(p.as_posix() for p in found.values()) == [f'out/pictures/{n}' for n in names]


def test_missing_images_and_pictures_over_images(tmp_path):
    touch(tmp_path, 'in/a.txt', 'x/pictures/a.jpg')
    with pytest.raises(UserError, match=r'no image found in .*in \(suffixes: \.bmp'):
        find_images([tmp_path / 'in'], tmp_path / 'out')
    with pytest.raises(UserError, match=r'no image or folder .*nothing\.jpg'):
        find_images([tmp_path / 'nothing.jpg'], tmp_path / 'out')
    with pytest.raises(UserError, match='would be overwritten by its picture'):
        find_images([tmp_path / 'x/pictures/a.jpg'], tmp_path / 'x')
