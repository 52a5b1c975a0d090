"""What the sweeps of OpenMMLab's packages share: parts of their configs."""
import contextlib
import sys
from collections.abc import Callable
from unittest import mock

from torch import distributed, nn

from tests import zoo

SIZES = (64, 128, 224, 256)


def functions(package: str,
              roles: tuple[str, ...] = zoo.ROLES,
              absent: tuple[str, ...] = (),
              told: dict[str, str] | None = None) -> tuple[Callable, ...]:
    """Make what a sweep asks of a package with configs.

    Args:
        package (str): As it is imported.
        roles (tuple[str, ...]): Which parts to sweep.
        absent (tuple[str, ...]): Modules that it imports, are not to be had,
            and that no network needs.
        told (dict[str, str], optional): Versions that it is told of packages
            that it takes older ones of only.

    Returns:
        tuple[Callable, ...]: ``names``, ``build`` and ``inputs``, see
        :mod:`tests.sweeps.libraries`.
    """

    def collect() -> zoo.Zoo:
        if not distributed.is_initialized():
            # MMCV's own SyncBN cannot be built without.
            distributed.init_process_group(
                'gloo', store=distributed.HashStore(), rank=0, world_size=1)
            sys.modules.update({name: mock.MagicMock() for name in absent})
            with contextlib.ExitStack() as stack:
                for name, version in (told or {}).items():
                    stack.enter_context(
                        mock.patch(f'{name}.__version__', version))
                zoo.registry(package)
        return zoo.collect(package, roles)

    def part(name: str) -> zoo.Part:
        found = collect()
        if name in found.missing:
            raise found.missing[name]
        return next(part for part in found.normalized if str(part) == name)

    def names() -> list[str]:
        found = collect()
        return [*map(str, zoo.sample(found.normalized)), *found.missing]

    def build(name: str) -> nn.Module:
        return zoo.build(part(name))

    def inputs(name: str, model: nn.Module, size: int) -> tuple:
        return zoo.inputs(part(name), model, size)

    return names, build, inputs
