"""What a pair was when it was checked in full.

To check a convolution and its normalization takes Python some ten
microseconds a call. So what was seen is written down as facts, and the next
call asks in one function of the native node (``csrc/guard.h``) whether they
still hold. Whatever is not a fact here has to be checked at each call.
"""
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from mmtune import native
from mmtune.behaviours.calls import PLAIN
from mmtune.behaviours.folding import FoldablePair
from mmtune.functional.fold import Plan, native_geometry

__all__ = ['CALL', 'GLOBAL_HOOKS', 'Known', 'Memory', 'entries', 'know']

# Who replaces these sees what every module gives.
CALL = nn.Module.__call__, nn.Module._call_impl

# Hooks of every module, and what is known of them: that there are none.
GLOBAL_HOOKS = tuple(
    (getattr(torch_module, name), ()) for name in (
        '_global_backward_pre_hooks', '_global_backward_hooks',
        '_global_forward_hooks', '_global_forward_pre_hooks'))
_ELSEWHERE = (
    *GLOBAL_HOOKS,
    (nn.Module, '__call__', CALL[0]),
    (nn.Module, '_call_impl', CALL[1]),
    (forward_ad, '_current_level', -1),
)
_DICTS = ('_parameters', '_buffers', '_modules', '_forward_pre_hooks',
          '_forward_hooks', '_backward_pre_hooks', '_backward_hooks')
STATE = ('weight', 'bias', 'running_mean', 'running_var')
_CONSTANTS = (bool, int, float, str, type(None))


class Memory(dict):
    """A dict whose copies and pickles are empty."""

    def __deepcopy__(self, memo: dict) -> 'Memory':
        return Memory()

    def __reduce__(self) -> tuple:
        return Memory, ()


class Known(NamedTuple):
    """A pair that was checked in full.

    Attributes:
        pair (FoldablePair): The pair.
        tensors (tuple[Tensor | None, ...]): What it learns and its
            statistics, the convolution's weight and bias first.
        facts (tuple): About everything but tensors' kinds and modes.
        likeness (bytes): Kinds of the input and the tensors, and the modes.
        node (ModuleType): The native node.
        arguments (tuple, optional): Of its fold, after the input; None where
            it is not certain that it may run.
    """

    pair: FoldablePair
    tensors: tuple[Tensor | None, ...]
    facts: tuple
    likeness: bytes
    node: ModuleType
    arguments: tuple | None

    def holds(self, x: Any) -> bool:
        """Whether a full check of now would find the same.

        Args:
            x: What the convolution is called with.
        """
        return (type(x) is Tensor and native.node() is self.node
                and self.node.unchanged(self.facts, x, self.tensors,
                                        self.likeness))

    def versions(self, x: Tensor) -> bytes:
        """Give the fingerprints of input, weight and bias, as a promise does.

        Args:
            x (Tensor): What the convolution is called with.
        """
        return self.node.versions(x, *self.tensors[:2])

    def run(self, x: Tensor) -> Tensor | None:
        """Run the two as one, see :meth:`FoldablePair.run`.

        Args:
            x (Tensor): What the convolution was called with.
        """
        if self.arguments is None:
            return self.pair.run((x, ))
        return self.node.fold_and_run(x, *self.arguments)


def know(block_facts: tuple, pair: FoldablePair, x: Tensor) -> Known | None:
    """Write down a pair that was checked in full just now.

    Args:
        block_facts (tuple): Of where the block has the two layers.
        pair (FoldablePair): The pair.
        x (Tensor): What the convolution was called with.

    Returns:
        Known | None: None where something could change unseen.
    """
    node = native.node()
    call, norm, norm_kind = pair.call, pair.norm, pair.norm_kind
    conv, conv_kind = call.conv, call.kind
    tensors = (call.weight, call.bias, *pair.tensors)
    if (node is None or pair.geometry is None or not norm_kind.is_plain
            or torch._C._len_torch_function_stack()
            or x.device.type not in ('cpu', 'cuda')
            or not all(map(_is_constant, call.settings))
            or type(pair.eps) not in _CONSTANTS
            or any(t is not None and type(t) not in PLAIN
                   for t in (x, *tensors))
            or not _are_kept(conv, ('weight', 'bias'), tensors)
            or not _are_kept(norm, STATE, pair.tensors)):
        return None
    facts = (*_ELSEWHERE, *block_facts, *_facts(conv, conv_kind),
             *_facts(norm, norm_kind))
    arguments = None
    if x.is_cpu and x.dtype == pair.dtype:
        arguments = (*tensors, pair.eps, *native_geometry(pair.geometry),
                     Plan.CHOOSE)
    return Known(pair, tensors, facts, node.like(x, tensors), node, arguments)


def _are_kept(layer: nn.Module, names: tuple[str, ...],
              tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a layer keeps tensors by their names, makes none at a call."""
    kept = {**layer._parameters, **layer._buffers}
    return not any(name in layer.__dict__ or kept.get(name) is not tensor
                   for name, tensor in zip(names, tensors))


def entries(*dicts: dict) -> tuple:
    """Give the fact that dicts have the entries that they have now.

    Args:
        *dicts (dict): Whose values are compared by identity.

    Returns:
        tuple[tuple]: One fact a dict.
    """
    return tuple((owner, tuple(entry for item in owner.items()
                               for entry in item)) for owner in dicts)


def _facts(layer: nn.Module, kind: Any) -> tuple:
    cls = type(layer)
    own = layer.__dict__
    return (
        *entries(own, *[own[name] for name in _DICTS]),
        *[(owner, name, getattr(owner, name)) for owner, names in (
            (cls, (*kind.reads(cls), '__call__', '_call_impl',
                   '__getattr__')), (F, kind.functions),
            (torch, kind.operators)) for name in names])


def _is_constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return type(value) in _CONSTANTS
