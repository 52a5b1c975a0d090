"""Download and prepare a dataset: Yellowstone's trees, or COCO 2017.

``trees`` is two aerial tiles from the DeepForest package (MIT licensed),
with every tree crown boxed, cut into crops in COCO format. ``coco2017`` is
what the COCO configs expect.

Each folder made here holds a ``SHA256SUMS`` of its files. A folder that
still agrees with it is left as it is; one that does not is made anew.
"""
import argparse
import hashlib
import json
import shutil
import urllib.request
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import mmcv
import numpy as np
import rich.progress
from rich.progress import (
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)

from mmtune.utils.wheel import read_from_wheel

CHECKSUMS = 'SHA256SUMS'

TREES_WHEEL = 'deepforest==2.1.0'
TREES_SHA256 = (
    '8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54')
TREES_LICENSE = 'deepforest-2.1.0.dist-info/licenses/LICENSE'
TREES_TILES = dict(
    train='deepforest/data/2019_YELL_2_528000_4978000_image_crop2',
    val='deepforest/data/2019_YELL_2_541000_4977000_image_crop')

COCO_URL = 'http://images.cocodataset.org'
# Folder, path of its archive on the server, md5 of the archive.
COCO_ARCHIVES = (
    ('annotations', 'annotations/annotations_trainval2017.zip',
     'f4bbac642086de4f52a3fdda2de5fa2c'),
    ('val2017', 'zips/val2017.zip', '442b8da7639aecaf257c1dceb8ba8c80'),
    ('train2017', 'zips/train2017.zip', 'cced6f7f71b7629ddf16f17bbcfab6b2'),
)

Window = tuple[int, int, int, int]


def hash_file(file: BinaryIO, algorithm: str) -> str:
    """Hash a file of any size.

    Args:
        file (BinaryIO): The open file.
        algorithm (str): A name that :func:`hashlib.new` knows.

    Returns:
        str: The digest in hexadecimal.
    """
    digest = hashlib.new(algorithm)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Hash a file with SHA-256.

    Args:
        path (Path): The file.

    Returns:
        str: The digest in hexadecimal.
    """
    with path.open('rb') as file:
        return hash_file(file, 'sha256')


def write_checksums(folder: Path) -> None:
    """List every file of a folder in its ``SHA256SUMS``.

    Args:
        folder (Path): The finished folder.
    """
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    lines = [
        f'{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n'
        for path in track(files, f'Hash {folder.name}')
    ]
    (folder / CHECKSUMS).write_text(''.join(lines))


def find_damage(folder: Path) -> list[str]:
    """Compare a folder with its ``SHA256SUMS``.

    Args:
        folder (Path): A folder that :func:`write_checksums` has sealed.

    Returns:
        List[str]: The files that are missing or differ.
    """
    lines = (folder / CHECKSUMS).read_text().splitlines()
    expected = [line.split('  ', 1) for line in lines]
    return [
        name for digest, name in track(expected, f'Check {folder.name}')
        if not (folder / name).is_file()
        or sha256_of(folder / name) != digest
    ]


def prepare(folder: Path, build: Callable[[Path], None]) -> None:
    """Make a folder unless it is there and intact.

    The folder is built under another name and renamed at the end, so that
    under its own name it is complete whatever interrupts this.

    Args:
        folder (Path): The folder wanted.
        build (Callable[[Path], None]): Fills the empty folder it is given.

    Raises:
        FileExistsError: If the folder is there but was not made by this
            function.
    """
    if folder.exists():
        if not (folder / CHECKSUMS).is_file():
            raise FileExistsError(
                f'{folder} exists but holds no {CHECKSUMS}, so it was not '
                'made here and is left alone; move it away or choose another '
                '--save-dir')
        damaged = find_damage(folder)
        if not damaged:
            print(f'{folder} is complete')
            return
        print(f'{folder} is damaged and will be made anew: {len(damaged)} '
              f'of its files are missing or differ, {damaged[0]} first')
    part = folder.with_name(f'.{folder.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    build(part)
    write_checksums(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    print(f'{folder} is complete')


def read_voc_boxes(xml: bytes) -> np.ndarray:
    """Read the boxes of a Pascal VOC annotation.

    Args:
        xml (bytes): The annotation file.

    Returns:
        np.ndarray: Shape (N, 4), left, top, right and bottom edge in
            pixels. VOC counts pixels from one and names the last one
            inside; here edges count from zero.
    """
    boxes = [[int(box.findtext(tag)) for tag in ('xmin', 'ymin', 'xmax',
                                                 'ymax')]
             for box in ElementTree.fromstring(xml).iter('bndbox')]
    return np.array(boxes) - [1, 1, 0, 0]


def overlapping_windows(width: int, height: int, size: int,
                        stride: int) -> list[Window]:
    """Spread square windows evenly over an image.

    Args:
        width (int): Of the image, in pixels.
        height (int): Of the image, in pixels.
        size (int): Side of a window, in pixels.
        stride (int): The largest step from one window to the next.

    Returns:
        List[Window]: Left, top, right and bottom edge of each window.
    """

    def starts(length: int) -> list[int]:
        count = -(-(length - size) // stride) + 1
        return np.linspace(0, length - size, count).round().astype(int)

    return [(int(left), int(top), int(left) + size, int(top) + size)
            for top in starts(height) for left in starts(width)]


def grid_windows(width: int, height: int, columns: int,
                 rows: int) -> list[Window]:
    """Divide an image into a grid of windows, without overlap or rest.

    Args:
        width (int): Of the image, in pixels.
        height (int): Of the image, in pixels.
        columns (int): How many windows side by side.
        rows (int): How many windows one below the other.

    Returns:
        List[Window]: Left, top, right and bottom edge of each window.
    """
    x = [int(edge) for edge in np.linspace(0, width, columns + 1).round()]
    y = [int(edge) for edge in np.linspace(0, height, rows + 1).round()]
    return [(left, top, right, bottom) for top, bottom in zip(y, y[1:])
            for left, right in zip(x, x[1:])]


def cut_boxes(boxes: np.ndarray, window: Window,
              min_visible: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut the boxes of an image to one window of it.

    Args:
        boxes (np.ndarray): Shape (N, 4), edges in pixels of the image.
        window (Window): Left, top, right and bottom edge.
        min_visible (float): The part of a box's area that has to be inside
            for it to count as an object.

    Returns:
        Tuple[np.ndarray, np.ndarray]: The M boxes that reach into the
            window, shape (M, 4), edges in pixels of the window; and
            whether each shows too little to be an object, shape (M, ).
    """
    left, top, right, bottom = window
    cut = np.clip(boxes, (left, top, left, top), (right, bottom) * 2)
    area, whole = ((box[:, 2:] - box[:, :2]).prod(1) for box in (cut, boxes))
    inside = area > 0
    ignored = area[inside] < min_visible * whole[inside]
    return cut[inside] - (left, top, left, top), ignored


def write_crops(image: np.ndarray, boxes: np.ndarray,
                windows: Sequence[Window], min_visible: float, folder: Path,
                split: str) -> None:
    """Cut one annotated image into a dataset in COCO format.

    Boxes that show less than ``min_visible`` of a tree are marked as crowd:
    finding them is neither asked for nor wrong. Windows without a tree are
    left out.

    Args:
        image (np.ndarray): Shape (H, W, 3), as mmcv reads it.
        boxes (np.ndarray): Shape (N, 4), edges in pixels.
        windows (Sequence[Window]): Where to cut.
        min_visible (float): See :func:`cut_boxes`.
        folder (Path): Crops go to ``folder/split``, annotations to
            ``folder/annotations/split.json``.
        split (str): Name of the subset.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for window in track(windows, f'Cut {split}'):
        cut, ignored = cut_boxes(boxes, window, min_visible)
        if ignored.all():
            continue
        left, top, right, bottom = window
        image_id = len(images) + 1
        name = f'{left:04d}_{top:04d}.png'
        mmcv.imwrite(image[top:bottom, left:right],
                     str(folder / split / name))
        images.append(
            dict(
                id=image_id,
                file_name=name,
                width=right - left,
                height=bottom - top))
        for (x1, y1, x2, y2), is_crowd in zip(cut.tolist(), ignored.tolist()):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=int(is_crowd)))
    path = folder / 'annotations' / f'{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=1, name='tree')])))
    objects = sum(not annotation['iscrowd'] for annotation in annotations)
    print(f'{split}: {len(images)} crops, {objects} trees')


def build_trees(folder: Path) -> None:
    """Fetch the two Yellowstone tiles and cut them into crops.

    Args:
        folder (Path): An empty folder.
    """
    members = [
        tile + suffix for tile in TREES_TILES.values()
        for suffix in ('.png', '.xml')
    ]
    files = read_from_wheel(TREES_WHEEL, TREES_SHA256,
                            [*members, TREES_LICENSE])
    (folder / 'LICENSE').write_bytes(files[TREES_LICENSE])
    for split, tile in TREES_TILES.items():
        image = mmcv.imfrombytes(files[f'{tile}.png'])
        boxes = read_voc_boxes(files[f'{tile}.xml'])
        height, width = image.shape[:2]
        if split == 'train':
            # Overlap shows each tree at several places and distances from
            # a border, like random crops would.
            windows = overlapping_windows(width, height, size=320, stride=200)
            min_visible = 0.4
        else:
            # Every pixel once, and only whole trees count, so that a tree
            # is evaluated at most once.
            windows = grid_windows(width, height, columns=3, rows=3)
            min_visible = 1.0
        write_crops(image, boxes, windows, min_visible, folder, split)


def download(url: str, path: Path, md5: str) -> None:
    """Download a large file, continuing where an earlier try stopped.

    Args:
        url (str): Where it is.
        path (Path): Where it goes; what is there already is kept, and
            checked with the rest.
        md5 (str): What it has to hash to, in hexadecimal.

    Raises:
        RuntimeError: If fewer bytes arrived than announced, or the file is
            not the one expected.
    """
    head = urllib.request.Request(url, method='HEAD')
    with urllib.request.urlopen(head, timeout=60) as response:
        size = int(response.headers['Content-Length'])
    done = path.stat().st_size if path.exists() else 0
    if done < size:
        request = urllib.request.Request(
            url, headers={'Range': f'bytes={done}-'})
        columns = (*Progress.get_default_columns()[:2], DownloadColumn(),
                   TransferSpeedColumn(), TimeRemainingColumn())
        with urllib.request.urlopen(
                request, timeout=60) as response, Progress(*columns) as bar:
            # 206 is an answer in part; any other brings the whole file.
            if response.status != 206:
                done = 0
            task = bar.add_task(path.name, total=size, completed=done)
            with path.open('ab' if done else 'wb') as file:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.advance(task, len(chunk))
        done = path.stat().st_size
        if done < size:
            raise RuntimeError(
                f'{url} ended after {done} of {size} bytes; run again to '
                'continue from there')
    with rich.progress.open(
            path, 'rb', description=f'Check {path.name}') as file:
        found = hash_file(file, 'md5')
    if found != md5:
        path.unlink()
        raise RuntimeError(
            f'{url} is not the file expected: its md5 is {found} instead of '
            f'{md5}; it was removed, run again to fetch it anew')


def download_archive(folder: Path, url: str, md5: str) -> None:
    """Fill a folder with what a zip archive holds in one of that name.

    The archive is downloaded to the folder's parent, and removed when the
    folder is complete.

    Args:
        folder (Path): The folder wanted.
        url (str): Where the archive is.
        md5 (str): What the archive has to hash to.
    """
    path = folder.parent / url.rsplit('/', 1)[1]

    def build(part: Path) -> None:
        download(url, path, md5)
        with zipfile.ZipFile(path) as archive:
            for member in track(archive.infolist(), f'Unzip {path.name}'):
                member.filename = member.filename.split('/', 1)[1]
                if member.filename:
                    archive.extract(member, part)

    prepare(folder, build)
    path.unlink(missing_ok=True)


def download_trees(save_dir: Path) -> None:
    """Prepare the trees in ``save_dir/trees``.

    Args:
        save_dir (Path): Where datasets live.
    """
    prepare(save_dir / 'trees', build_trees)


def download_coco(save_dir: Path,
                  base_url: str = COCO_URL,
                  archives: Sequence[tuple[str, str, str]] = COCO_ARCHIVES
                  ) -> None:
    """Prepare COCO 2017's train and val subsets in ``save_dir/coco``.

    Args:
        save_dir (Path): Where datasets live.
        base_url (str): The server.
        archives (Sequence[Tuple[str, str, str]]): For each folder its
            name, the path of its archive on the server, and the archive's
            md5.
    """
    coco = save_dir / 'coco'
    coco.mkdir(parents=True, exist_ok=True)
    for name, path, md5 in archives:
        download_archive(coco / name, f'{base_url}/{path}', md5)


DATASETS = dict(trees=download_trees, coco2017=download_coco)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--dataset-name', choices=sorted(DATASETS), required=True)
    parser.add_argument(
        '--save-dir',
        type=Path,
        default=Path('data'),
        help='folder for datasets (default: %(default)s)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    DATASETS[args.dataset_name](args.save_dir)


if __name__ == '__main__':
    main()
