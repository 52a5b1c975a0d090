"""What each kind of normalization is to the fold.

``NORM_KINDS`` maps the dotted name of a class to its kind. What is in it, or
normalizes with statistics that it keeps in a way that
:mod:`mmtune.layers.frozen` or :mod:`mmtune.layers.calls` can make sure of, is
folded; nothing else is.
"""
import re

import torch
from torch import Tensor, nn

from mmtune.layers.calls import calls_batch_norm
from mmtune.layers.code import LIBRARIES, known_kind, same_code
from mmtune.layers.convolutions import looks_like_conv
from mmtune.layers.frozen import Frozen, frozen, still_is
from mmtune.layers.kinds import NormKind

__all__ = ['NORM_KINDS', 'looks_like_norm', 'norm_kind', 'why_not_folded']


class _BatchNorm(NormKind):
    """``nn.BatchNorm1d``, ``nn.BatchNorm2d``, ``nn.BatchNorm3d``."""

    is_plain = True
    methods = (*NormKind.methods, '_check_input_dim')
    functions = ('batch_norm', )
    operators = ('batch_norm', )


class _CallsBatchNorm(NormKind):
    """What normalizes by ``F.batch_norm``, and does more (activates, say)."""

    functions = ('batch_norm', )
    operators = ('batch_norm', )
    runs_forward = True
    does_more = True

    def check_input(self, norm, x):
        pass


class _InstanceNorm(NormKind):
    """``nn.InstanceNorm2d`` with ``track_running_stats=True``."""

    is_plain = True
    methods = (*NormKind.methods, '_check_input_dim', '_apply_instance_norm')
    functions = ('instance_norm', )
    operators = ('instance_norm', )

    def is_fixed(self, norm):
        return norm.track_running_stats and super().is_fixed(norm)


class _SyncBatchNormOfMMCV(NormKind):
    """MMCV's ``MMSyncBN``."""

    is_plain = True
    functions = ('batch_norm', )

    def is_fixed(self, norm):
        return norm.track_running_stats and super().is_fixed(norm)

    def check_input(self, norm, x):
        pass


class _FrozenNorm(NormKind):
    """A ``FrozenBatchNorm2d``: four buffers, in train mode too.

    Args:
        found (Frozen): What trying its forward has shown.
    """

    takes_half = False
    is_plain = True

    def __init__(self, found: Frozen) -> None:
        self.found = found
        self.does_more = bool(found.rest)
        self.seen: tuple = ()

    def code(self, layer_type):
        # Whatever its forward may read or call of the class, which
        # torch.compile cannot list.
        if not torch.compiler.is_compiling():
            self.seen = tuple(
                (name, value) for base in layer_type.__mro__
                if base not in (nn.Module, object)
                for name, value in vars(base).items()
                if not name.startswith('__') or name == '__getattr__')
        return self.seen

    def reads(self, layer_type):
        return tuple(name for name, _ in self.code(layer_type))

    def eps(self, norm):
        return norm.eps if self.found.eps is None else self.found.eps

    def computes_formula(self, norm, x):
        return x.dim() == 4 and still_is(norm, self.found)

    def finish(self, norm, output):
        for name in self.found.rest:
            output = getattr(norm, name)(output)
        return output

    def is_fixed(self, norm):
        return True

    def check_input(self, norm, x):
        pass


NORM_KINDS: dict[str, NormKind] = {
    'torch.nn.modules.batchnorm._BatchNorm': _BatchNorm(),
    'torch.nn.modules.batchnorm.SyncBatchNorm': _BatchNorm(),
    'torch.nn.modules.instancenorm._InstanceNorm': _InstanceNorm(),
    'mmcv.ops.sync_bn.SyncBatchNorm': _SyncBatchNormOfMMCV(),
}


_CALLS_BATCH_NORM = _CallsBatchNorm()


def norm_kind(norm: nn.Module) -> NormKind | None:
    """Look up the kind of a normalization.

    Subclasses count as for :func:`conv_kind`. A ``FrozenBatchNorm2d`` needs
    no entry: it is known by its buffers, and by what it computes.

    Args:
        norm (nn.Module): The module.

    Returns:
        NormKind | None: None for anything that must run as it is.
    """
    norm_type = type(norm)
    kind, known = known_kind(norm_type, NORM_KINDS)
    if (kind is not None and not _checks_input(norm_type)
            and same_code(norm_type, known, '__call__', 'forward')):
        return kind
    if kind is None:
        found = frozen(norm)
        if isinstance(found, Frozen):
            return _FrozenNorm(found)
    if ('running_mean' in norm._buffers
            and norm_type.__call__ is nn.Module.__call__
            and not isinstance(norm, torch.jit.ScriptModule)
            and calls_batch_norm(norm)):
        return _CALLS_BATCH_NORM
    return None


def _checks_input(norm_type: type) -> bool:
    """Whether code of the user's looks at what the normalization gets."""
    owner = next((c for c in norm_type.__mro__
                  if '_check_input_dim' in vars(c)), torch.nn.Module)
    return owner.__module__.partition('.')[0] not in LIBRARIES


# They keep no statistics, or may be asked not to.
_OF_THE_INPUT = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm,
                 nn.CrossMapLRN2d, nn.modules.instancenorm._InstanceNorm,
                 *([nn.RMSNorm] if hasattr(nn, 'RMSNorm') else []))
# Not: normed weights, normal vectors, the normalizing of images.
_NORM_NAME = re.compile('norm(?!ed|al(?!ization))', re.IGNORECASE)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module is some normalization, be it of a known kind or not.

    Args:
        module (nn.Module): The module.

    Returns:
        bool: False for what only holds normalizations or convolutions.
    """
    if isinstance(module, (nn.modules.batchnorm._NormBase, *_OF_THE_INPUT)):
        return True
    own = _own_tensors(module)
    if {'running_mean', 'running_var'} <= own.keys():
        return True
    if (looks_like_conv(module) or isinstance(module, nn.Identity)
            or type(module).__module__ == 'torch.nn.utils.parametrizations'):
        return False
    # A scale and a shift of each channel, as an AffineChannel has.
    affine = (own.keys() == {'weight', 'bias'}
              and own['weight'].dim() == own['bias'].dim() == 1)
    return (affine or _NORM_NAME.search(
        type(module).__name__) is not None) and not any(
        looks_like_conv(part) or looks_like_norm(part)
        for part in module.modules() if part is not module)


def why_not_folded(norm: nn.Module) -> str | None:
    """Say why a normalization is never folded, whatever comes before it.

    Args:
        norm (nn.Module): What looks like one.

    Returns:
        str | None: The reason; None for one that may be folded.
    """
    norm_type = type(norm)
    name = norm_type.__name__
    keeps = 'running_mean' in _own_tensors(norm)
    if keeps and norm_kind(norm) is not None:
        return None
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        if not keeps:
            return 'the BN has no running statistics'
        if _checks_input(norm_type):
            return f'{name} overrides `_check_input_dim`'
        return f'{name} overrides the forward of BatchNorm'
    if not keeps:
        if isinstance(norm, _OF_THE_INPUT) and norm_type.__module__.startswith(
                'torch.nn.'):
            return (f'{name} computes its statistics from the batch at hand: '
                    'there is nothing to fold')
        return f'{name} keeps no running statistics that could be folded'
    found = frozen(norm)
    if isinstance(found, str):
        return found
    return f'{name} is not a normalization that mmtune knows'
