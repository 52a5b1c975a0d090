"""What the sweeps of OpenMMLab's packages share: parts of their configs."""
import sys
from collections.abc import Callable
from unittest import mock

import mmcv
from torch import distributed, nn

from tests import zoo

SIZES = (64, 128, 224, 256)


def functions(package: str,
              roles: tuple[str, ...] = zoo.ROLES,
              absent: tuple[str, ...] = (),
              told: str = mmcv.__version__) -> tuple[Callable, ...]:
    """Make what a sweep asks of a package with configs.

    Args:
        package (str): As it is imported.
        roles (tuple[str, ...]): Which parts to sweep.
        absent (tuple[str, ...]): Modules that it imports, are not to be had,
            and that no network needs.
        told (str): The version of mmcv that it is told.

    Returns:
        tuple[Callable, ...]: ``names``, ``build`` and ``inputs``, see
        :mod:`tests.sweeps.libraries`.
    """

    def parts() -> dict[str, zoo.Part]:
        if not distributed.is_initialized():
            # MMCV's own SyncBN cannot be built without.
            distributed.init_process_group(
                'gloo', store=distributed.HashStore(), rank=0, world_size=1)
            sys.modules.update({name: mock.MagicMock() for name in absent})
            with mock.patch.object(mmcv, '__version__', told):
                zoo.registry(package)
        return {str(part): part for part in zoo.collect(package).normalized}

    def names() -> list[str]:
        return [str(part) for part in zoo.sample(
            [part for part in parts().values() if part.role in roles])]

    def build(name: str) -> nn.Module:
        return zoo.build(parts()[name])

    def inputs(name: str, model: nn.Module, size: int) -> tuple:
        return zoo.inputs(parts()[name], model, size)

    return names, build, inputs
