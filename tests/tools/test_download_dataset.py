"""tools/misc/download_dataset.py, on small data from this machine."""
import functools
import hashlib
import importlib.util
import io
import json
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mmcv
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/misc/download_dataset.py'

spec = importlib.util.spec_from_file_location('download_dataset', SCRIPT)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

WIDTH, HEIGHT = 700, 500


def snapshot(folder):
    """Every file in a folder, with its content and age."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob('*') if path.is_file()
    }


# trees


def make_tile(seed):
    """A black tile whose trees are rectangles of one shade each.

    Returns the pixels, the VOC annotation and the number of trees. The
    shade of tree i is i + 1, so that pixels tell which tree is where.
    """
    rng = np.random.default_rng(seed)
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    objects = []
    # One a cell of a grid, so that none hides another; the last column and
    # row of cells touch the right and the bottom edge.
    for left in range(0, WIDTH, 70):
        for top in range(0, HEIGHT, 50):
            x1 = left + int(rng.integers(0, 30))
            y1 = top + int(rng.integers(0, 20))
            x2, y2 = left + 70, top + 50
            image[y1:y2, x1:x2] = len(objects) + 1
            objects.append('<object><name>Tree</name><bndbox>'
                           f'<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>'
                           f'<xmax>{x2}</xmax><ymax>{y2}</ymax>'
                           '</bndbox></object>')
    xml = f'<annotation>{"".join(objects)}</annotation>'.encode()
    return image, xml, len(objects)


def encode(image):
    return mmcv.image.io.cv2.imencode('.png', image)[1].tobytes()


@pytest.fixture(scope='module')
def wheel():
    """What the wheel of the trees holds here."""
    files = {tool.TREES_LICENSE: b'You may.'}
    for seed, tile in enumerate(tool.TREES_TILES.values()):
        image, xml, _ = make_tile(seed)
        files.update({f'{tile}.png': encode(image), f'{tile}.xml': xml})
    return files


@pytest.fixture
def fetched(wheel, monkeypatch):
    """Stand in for pip; returns the list of what was fetched."""
    requests = []

    def read_from_wheel(requirement, sha256, members):
        requests.append((requirement, sha256))
        return {member: wheel[member] for member in members}

    monkeypatch.setattr(tool, 'read_from_wheel', read_from_wheel)
    return requests


@pytest.fixture
def trees(fetched, tmp_path):
    tool.download_trees(tmp_path)
    return tmp_path / 'trees'


def crops(folder, split):
    """Yield name, pixels and annotations of each image of a subset."""
    coco = COCO(folder / f'annotations/{split}.json')
    for info in coco.imgs.values():
        image = mmcv.imread(folder / split / info['file_name'])
        assert image.shape == (info['height'], info['width'], 3)
        yield info['file_name'], image, coco.imgToAnns[info['id']]


def visible_trees(image, tile):
    """Of each tree in a crop its box and the part of it that is seen.

    Told from the pixels alone.
    """
    sizes = np.bincount(tile[..., 0].ravel(), minlength=256)
    trees = {}
    for shade in np.unique(image[image > 0]).tolist():
        y, x = np.nonzero(image[..., 0] == shade)
        box = (x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min())
        trees[tuple(map(int, box))] = len(x) / sizes[shade]
    return trees


@pytest.mark.parametrize('split, min_visible', [('train', 0.4), ('val', 1.0)])
def test_boxes_fit_the_pixels(trees, split, min_visible):
    tile, _, _ = make_tile(('train', 'val').index(split))
    for _, image, annotations in crops(trees, split):
        seen = visible_trees(image, tile)
        assert {tuple(a['bbox']): bool(a['iscrowd'])
                for a in annotations} == {
                    box: part < min_visible
                    for box, part in seen.items()
                }
        assert all(a['area'] == a['bbox'][2] * a['bbox'][3]
                   for a in annotations)


def test_crops_of_training_are_spread_over_the_whole_tile(trees):
    tile, _, count = make_tile(0)
    found = set()
    for name, image, _ in crops(trees, 'train'):
        left, top = map(int, re.findall(r'\d+', name))
        assert image.shape == (320, 320, 3)
        np.testing.assert_array_equal(image,
                                      tile[top:top + 320, left:left + 320])
        found.update(np.unique(image).tolist())
    assert found == set(range(count + 1))


def test_crops_of_validation_put_the_tile_together_again(trees):
    tile, _, count = make_tile(1)
    whole = np.zeros_like(tile)
    evaluated = 0
    for name, image, annotations in crops(trees, 'val'):
        left, top = map(int, re.findall(r'\d+', name))
        place = whole[top:top + len(image), left:left + image.shape[1]]
        assert not place.any()
        place[:] = image
        evaluated += sum(not a['iscrowd'] for a in annotations)
    np.testing.assert_array_equal(whole, tile)
    assert count / 2 < evaluated < count


def test_license_comes_along(trees):
    assert (trees / 'LICENSE').read_text() == 'You may.'


def test_windows_without_trees_are_left_out(tmp_path):
    image = np.zeros((100, 200, 3), dtype=np.uint8)
    tool.write_crops(image, np.array([[10, 10, 30, 30]]),
                     [(0, 0, 100, 100), (100, 0, 200, 100)], 0.4, tmp_path,
                     'train')
    assert [name for name, _, _ in crops(tmp_path, 'train')
            ] == ['0000_0000.png']
    assert len(list((tmp_path / 'train').iterdir())) == 1


def test_intact_dataset_is_reused(trees, fetched, capsys):
    before = snapshot(trees)
    tool.download_trees(trees.parent)
    assert snapshot(trees) == before
    assert len(fetched) == 1
    assert 'is complete' in capsys.readouterr().out


@pytest.mark.parametrize('damage', [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b'?'),
], ids=['missing', 'shorter', 'changed'])
@pytest.mark.parametrize('name', ['val/0000_0000.png',
                                  'annotations/train.json'])
def test_damaged_dataset_is_made_anew(trees, fetched, capsys, damage, name):
    before = snapshot(trees)
    damage(trees / name)
    tool.download_trees(trees.parent)
    assert f'damaged and will be made anew: 1 of its files are missing or ' \
        f'differ, {name} first' in capsys.readouterr().out
    assert len(fetched) == 2
    assert {k: v[0] for k, v in snapshot(trees).items()
            } == {k: v[0] for k, v in before.items()}


@pytest.mark.parametrize('moment', ['write_crops', 'write_checksums'])
def test_interrupted_dataset_is_started_over(fetched, tmp_path, monkeypatch,
                                             moment):
    original = getattr(tool, moment)

    def interrupted(*args):
        original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tool, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            tool.download_trees(tmp_path)
    assert not (tmp_path / 'trees').exists()
    leftover, = tmp_path.iterdir()
    (leftover / 'val').mkdir(exist_ok=True)
    (leftover / 'val/leftover.png').touch()

    tool.download_trees(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['trees']
    assert not (tmp_path / 'trees/val/leftover.png').exists()
    assert tool.find_damage(tmp_path / 'trees') == []


def test_folder_of_someone_else_is_left_alone(fetched, tmp_path):
    (tmp_path / 'trees').mkdir()
    (tmp_path / 'trees/mine.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='was not made here'):
        tool.download_trees(tmp_path)
    assert (tmp_path / 'trees/mine.txt').read_text() == 'mine'
    assert fetched == []


@pytest.mark.parametrize('arguments, message', [
    ([], 'required: --dataset-name'),
    (['--dataset-name', 'shrubs'], "invalid choice: 'shrubs'"),
])
def test_wrong_dataset_name(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit):
        tool.main()
    assert message in capsys.readouterr().err


def test_script_writes_to_the_folder_named(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', [
        str(SCRIPT), '--dataset-name', 'trees', '--save-dir',
        str(tmp_path / 'new')
    ])
    tool.main()
    assert tool.find_damage(tmp_path / 'new/trees') == []


def test_voc_counts_pixels_from_one():
    xml = (b'<annotation><object><bndbox><xmin>1</xmin><ymin>3</ymin>'
           b'<xmax>10</xmax><ymax>4</ymax></bndbox></object></annotation>')
    # Pixels 1 to 10 of the row lie between the edges 0 and 10.
    np.testing.assert_array_equal(tool.read_voc_boxes(xml), [[0, 2, 10, 4]])


@given(st.integers(320, 3000), st.integers(320, 3000), st.integers(50, 320))
def test_overlapping_windows_cover_the_image(width, height, stride):
    windows = tool.overlapping_windows(width, height, 320, stride)
    for low, high, length in ((0, 2, width), (1, 3, height)):
        starts = sorted({window[low] for window in windows})
        assert starts[0] == 0
        assert max(window[high] for window in windows) == length
        assert all(window[high] - window[low] == 320 for window in windows)
        # Rounding to whole pixels adds less than one.
        assert max(np.diff(starts), default=0) <= stride + 1
    assert len(set(windows)) == len(windows)


@given(st.integers(10, 3000), st.integers(10, 3000), st.integers(1, 9),
       st.integers(1, 9))
def test_grid_windows_share_out_the_image(width, height, columns, rows):
    windows = tool.grid_windows(width, height, columns, rows)
    assert len(windows) == columns * rows
    seen = np.zeros((height, width), dtype=np.uint8)
    for left, top, right, bottom in windows:
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize('box, expected, ignored', [
    ((10, 10, 20, 30), (10, 10, 20, 30), False),
    ((90, 40, 110, 60), (90, 40, 100, 50), True),
    ((-12, 10, 8, 20), (0, 10, 8, 20), False),
    ((-13, 10, 7, 20), (0, 10, 7, 20), True),
    ((100, 10, 120, 20), None, None),
    ((10, -20, 20, 0), None, None),
    ((-10, -10, 110, 60), (0, 0, 100, 50), False),
], ids=['inside', 'quarter', '40%', '35%', 'touching', 'above', 'around'])
def test_cut_boxes(box, expected, ignored):
    offset = np.array([500, 300, 500, 300])
    cut, is_ignored = tool.cut_boxes(
        np.array([box]) + offset, (500, 300, 600, 350), 0.4)
    if expected is None:
        assert len(cut) == len(is_ignored) == 0
    else:
        np.testing.assert_array_equal(cut, [expected])
        assert is_ignored.tolist() == [ignored]


# COCO 2017


class Server(HTTPServer):
    """Serves bytes from a dict, and remembers the requests.

    Attributes:
        files (dict): Content of each path.
        ranges (bool): Whether a request for a part is answered with it.
        limit (int): After how many bytes the connection breaks.
        log (list): Method, path and Range header of each request.
    """

    def __init__(self, files):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files = files
        self.ranges = True
        self.limit = None
        self.log = []
        self.url = f'http://127.0.0.1:{self.server_port}'


class Handler(BaseHTTPRequestHandler):

    def answer(self):
        self.server.log.append(
            (self.command, self.path, self.headers['Range']))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return b''
        wanted = re.match(r'bytes=(\d+)-$', self.headers['Range'] or '')
        if wanted and self.server.ranges:
            content = content[int(wanted[1]):]
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header('Content-Length', len(content))
        self.end_headers()
        return content[:self.server.limit]

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())

    def log_message(self, *args):
        pass


def make_zip(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ARCHIVES = {
    '/annotations/annotations_trainval2017.zip':
    make_zip({
        'annotations/instances_train2017.json': json.dumps(dict(a=1)),
        'annotations/instances_val2017.json': json.dumps(dict(b=2)),
    }),
    '/zips/val2017.zip':
    make_zip({
        'val2017/': b'',
        'val2017/000000000001.jpg': bytes(range(256)) * 40
    }),
}
VAL = ARCHIVES['/zips/val2017.zip']


@pytest.fixture
def server():
    with Server(dict(ARCHIVES)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02, ))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def download_coco(server, tmp_path):
    return functools.partial(
        tool.download_coco,
        tmp_path,
        base_url=server.url,
        archives=[(name, path[1:], hashlib.md5(ARCHIVES[path]).hexdigest())
                  for name, path in zip(('annotations', 'val2017'), ARCHIVES)])


def gets(server, path='/zips/val2017.zip'):
    return [part for method, name, part in server.log
            if (method, name) == ('GET', path)]


def check_coco(folder):
    assert sorted(path.name for path in folder.iterdir()
                  ) == ['annotations', 'val2017']
    assert json.loads((folder / 'annotations/instances_val2017.json'
                       ).read_text()) == dict(b=2)
    assert (folder / 'val2017/000000000001.jpg').read_bytes() == bytes(
        range(256)) * 40


def test_coco_is_where_the_configs_look(download_coco, tmp_path):
    download_coco()
    check_coco(tmp_path / 'coco')


def test_coco_is_reused(download_coco, server, tmp_path):
    download_coco()
    before = snapshot(tmp_path)
    server.log.clear()
    download_coco()
    assert snapshot(tmp_path) == before
    assert server.log == []


def test_damaged_coco_folder_is_fetched_again(download_coco, server, tmp_path,
                                              capsys):
    download_coco()
    server.log.clear()
    (tmp_path / 'coco/val2017/000000000001.jpg').write_bytes(b'half')
    download_coco()
    check_coco(tmp_path / 'coco')
    assert 'val2017 is damaged' in capsys.readouterr().out
    assert {path for _, path, _ in server.log} == {'/zips/val2017.zip'}


def test_broken_download_is_continued(download_coco, server, tmp_path):
    server.limit = 1000
    with pytest.raises(RuntimeError, match='ended after 1000 of'):
        download_coco()
    assert not (tmp_path / 'coco/val2017').exists()
    server.limit = None
    server.log.clear()
    download_coco()
    assert gets(server) == ['bytes=1000-']
    check_coco(tmp_path / 'coco')


def test_server_that_cannot_continue_sends_everything(download_coco, server,
                                                      tmp_path):
    (tmp_path / 'coco').mkdir()
    (tmp_path / 'coco/val2017.zip').write_bytes(VAL[:1000])
    server.ranges = False
    download_coco()
    assert gets(server) == ['bytes=1000-']
    check_coco(tmp_path / 'coco')


def test_complete_download_is_only_unzipped(download_coco, server, tmp_path):
    (tmp_path / 'coco').mkdir()
    (tmp_path / 'coco/val2017.zip').write_bytes(VAL)
    download_coco()
    assert gets(server) == []
    check_coco(tmp_path / 'coco')


@pytest.mark.parametrize('content', [
    b'?' + VAL[1:-1],
    b'?' + VAL[1:],
    VAL + b'?',
], ids=['begun wrongly', 'complete but wrong', 'too long'])
def test_damaged_archive_is_noticed(download_coco, tmp_path, content):
    archive = tmp_path / 'coco/val2017.zip'
    archive.parent.mkdir()
    archive.write_bytes(content)
    with pytest.raises(RuntimeError, match='not the file expected: its md5'):
        download_coco()
    assert not archive.exists()
    assert not (tmp_path / 'coco/val2017').exists()
    download_coco()
    check_coco(tmp_path / 'coco')


def test_interrupted_unzipping_is_started_over(download_coco, server,
                                               tmp_path, monkeypatch):

    def interrupted(self, member, path):
        (Path(path) / 'leftover.jpg').touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, 'extract', interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_coco()
    assert not (tmp_path / 'coco/annotations').exists()
    server.log.clear()
    download_coco()
    check_coco(tmp_path / 'coco')
    assert not (tmp_path / 'coco/annotations/leftover.jpg').exists()
    # What was downloaded before is used.
    assert gets(server, '/annotations/annotations_trainval2017.zip') == []


def test_archive_that_the_server_lacks(download_coco, server, tmp_path):
    del server.files['/zips/val2017.zip']
    with pytest.raises(OSError, match='404'):
        download_coco()
    assert not (tmp_path / 'coco/val2017').exists()
