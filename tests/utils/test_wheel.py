"""read_from_wheel, with pip itself and a folder of wheels for an index."""
import hashlib
import zipfile

import pytest

from mmtune.utils import read_from_wheel

FILES = {
    'crowns/data/tile.png': b'\x89PNG' + bytes(1000),
    'crowns/data/tile.xml': b'<annotation/>',
    'crowns-1.2.dist-info/METADATA':
    b'Metadata-Version: 2.1\nName: crowns\nVersion: 1.2\n',
    'crowns-1.2.dist-info/WHEEL':
    b'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    'crowns-1.2.dist-info/RECORD': b'',
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The only wheel that pip can find."""
    path = tmp_path / 'crowns-1.2-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_members_are_read(wheel):
    members = ['crowns/data/tile.png', 'crowns/data/tile.xml']
    assert read_from_wheel('crowns==1.2', sha256(wheel), members) == {
        name: FILES[name]
        for name in members
    }


def test_nothing_stays_on_disk(wheel, tmp_path, monkeypatch):
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(temporary))
    read_from_wheel('crowns==1.2', sha256(wheel), ['crowns/data/tile.xml'])
    assert list(temporary.iterdir()) == []


def test_another_wheel_of_the_same_name_is_refused(wheel):
    expected = sha256(wheel)
    with zipfile.ZipFile(wheel, 'a') as archive:
        archive.writestr('crowns/extra.py', b'')
    with pytest.raises(RuntimeError, match=sha256(wheel)) as error:
        read_from_wheel('crowns==1.2', expected, ['crowns/data/tile.xml'])
    assert expected in str(error.value)


@pytest.mark.parametrize('requirement', ['crowns==1.3', 'shrubs==1.2'])
def test_a_wheel_that_does_not_exist(wheel, requirement):
    with pytest.raises(RuntimeError, match=f'fetch {requirement}'):
        read_from_wheel(requirement, sha256(wheel), [])


def test_a_member_that_does_not_exist(wheel):
    with pytest.raises(KeyError, match='shrub.png'):
        read_from_wheel('crowns==1.2', sha256(wheel), ['shrub.png'])
