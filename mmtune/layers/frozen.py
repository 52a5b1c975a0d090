"""Know a frozen BatchNorm by what it computes, whatever it is called.

Torchvision, detectron2, MMDetection's relatives and many a project have a
``FrozenBatchNorm2d`` of their own, with an ``eps`` in an attribute, written in
its forward, or none. A module is one where it has nothing but the four
buffers of a BatchNorm and its forward gives, for all that is tried, ::

    (x - running_mean) / sqrt(running_var + eps) * weight + bias

and then calls modules of its own, one after the other, or none.
"""
import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.utils._python_dispatch import _disable_current_modes

from mmtune.layers.cases import VARIANCES, Case
from mmtune.utils.attach import (
    BACKWARD_HOOKS,
    HOOKS,
    Override,
    bare_copy,
    overridden,
)

__all__ = ['Frozen', 'forget_probes', 'frozen', 'still_is']

FORMULA = '(x - running_mean) / sqrt(running_var + eps) * weight + bias'
BUFFERS = ('weight', 'bias', 'running_mean', 'running_var')
# Tried in the place of an attribute `eps`, to see whether it is read.
OTHER_EPS = (0., 1e-3, .5)

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype,
          torch.device, torch.memory_format)
_OF_EVERY_MODULE = {*vars(nn.Module()), '_compiled_call_impl'}


class Frozen(NamedTuple):
    """What was found of a frozen normalization.

    Attributes:
        eps (float, optional): What its forward adds to the variance; None
            where that is the attribute ``eps``, as it is at the call.
        attributes (dict[str, Any]): What its forward may read beside
            tensors, but for an ``eps`` that is read at each call.
        children (dict[str, type]): The classes of its modules.
        rest (tuple[str, ...]): Those that its forward calls, in that order.
    """

    eps: float | None
    attributes: dict[str, Any]
    children: dict[str, type]
    rest: tuple[str, ...]


def _attributes(norm: nn.Module) -> dict[str, Any]:
    """Those of a module that neither torch nor mmtune has put there."""
    return {
        name: value
        for name, value in vars(norm).items()
        if not (name in _OF_EVERY_MODULE or name.startswith('_tune_')
                or isinstance(value, Override))
    }


def _children(norm: nn.Module) -> dict[str, type]:
    return {
        name: type(module)
        for name, module in norm._modules.items() if module is not None
    }


def still_is(norm: nn.Module, found: Frozen) -> bool:
    """Whether a module is what it was found to be.

    Args:
        norm (nn.Module): The module.
        found (Frozen): From :func:`frozen`.

    Returns:
        bool: False where an attribute that its forward may read is another,
            or it holds other things than it did.
    """
    if not _has_the_buffers(norm) or _children(norm) != found.children:
        return False
    attributes = _attributes(norm)
    if found.eps is None:
        attributes.pop('eps', None)
        if not _is_number(norm.eps):
            return False
    return (all(map(_is_plain, attributes.values()))
            and attributes == found.attributes)


_PROBES: dict[tuple, Frozen | str] = {}


def forget_probes() -> None:
    """Have every forward run anew: code can change in ways unseen."""
    _PROBES.clear()


def frozen(norm: nn.Module) -> Frozen | str | None:
    """Find out whether a module is a frozen normalization.

    Its forward runs on a copy, on the CPU and in float64, whatever the
    caller's device, dtype and modes.

    Args:
        norm (nn.Module): The module; is not changed.

    Returns:
        Frozen | str | None: A reason where it has the buffers of one but is
        none, or not certainly; None where it has others.
    """
    if not _has_the_buffers(norm):
        return None
    norm_type: Any = type(norm)
    name = norm_type.__name__
    if isinstance(norm, torch.jit.ScriptModule):
        return f'the code of this {name} was generated for this instance'
    if (norm_type.__call__ is not nn.Module.__call__
            or overridden(norm, 'forward')):
        return f'{name} is called in a way of its own'
    if any('__slots__' in vars(base) for base in norm_type.__mro__
           if not base.__module__.startswith(('torch.', 'builtins'))):
        return f'{name} has slots, whose changes could not be noticed'
    attributes = _attributes(norm)
    for attribute, value in attributes.items():
        if not _is_plain(value):
            return (f'{name} holds a {type(value).__name__} as '
                    f'{attribute!r}, whose changes could not be noticed')
    # Alike in all that a forward can read, or in nothing that it should.
    key = (norm_type, norm_type.forward, norm.running_mean.numel(),
           repr(attributes), tuple(norm._buffers), *_children(norm).items())
    if key not in _PROBES:
        _PROBES[key] = _Probe(norm).result()
    return _PROBES[key]


def _has_the_buffers(norm: nn.Module) -> bool:
    # Scripted modules have no dicts, only what can be made into one.
    buffers = {**norm._buffers}
    if (buffers.keys() - {'num_batches_tracked'} != set(BUFFERS)
            or any(p is not None for p in {**norm._parameters}.values())):
        return False
    own = [buffers[name] for name in BUFFERS]
    # Not `is_lazy`, which torch.compile cannot trace.
    return (not any(t is None or isinstance(t, UninitializedBuffer)
                    for t in own)
            and all(t.is_floating_point() and t.dim() == 1 and t.numel()
                    and t.shape == own[0].shape and t.dtype == own[0].dtype
                    for t in own))


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, set, frozenset, torch.Size):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return isinstance(value, _PLAIN)


class _Probe:
    """Runs the forward of a module on tensors of its own choice.

    Args:
        norm (nn.Module): Gives all but the tensors.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm_type: Any = type(norm)
        self.attributes = copy.deepcopy(_attributes(norm))
        self.channels = norm.running_mean.numel()
        self.norm = bare_copy(norm)
        # A forward may append to a list.
        vars(self.norm).update(copy.deepcopy(self.attributes))
        self.counts = 'num_batches_tracked' in norm._buffers
        self.children = {
            name: module
            for name, module in norm._modules.items() if module is not None
        }
        self.calls: list[_CallOfChild] = []
        vars(self.norm)['_modules'] = {
            name: _Noting(name, self.calls) for name in self.children
        }
        # What it calls after the formula, once that was seen.
        self.rest: tuple[str, ...] | None = None

    def result(self) -> Frozen | str:
        """What the module is, or why it is none."""
        name = self.norm_type.__name__
        try:
            with _neutral():
                eps = self._find_eps()
                # Each channel meets each variance.
                certain = eps is not None and self._computes(
                    eps, len(VARIANCES))
                reads = certain and self._reads_eps()
                certain = certain and self._ends_in_children()
        except Exception as error:  # code of the user's: anything
            return (f'the forward of {name} could not be tried '
                    f'({type(error).__name__})')
        if not certain:
            return f'{name} computes something else, or more, than {FORMULA}'
        if reads:
            self.attributes.pop('eps', None)
        return Frozen(None if reads else eps, self.attributes,
                      {name: type(module)
                       for name, module in self.children.items()},
                      self.rest or ())

    def _find_eps(self) -> float | None:
        """What the forward adds to a variance of zero."""
        zeros, ones = self._full(0.), self._full(1.)
        x = ones.view(1, -1, 1, 1)
        result = self._run(x, True, False, (ones, zeros, -ones, zeros))
        if result is None:
            return None
        # 2 / sqrt(eps), in each channel.
        eps = float((2 / result[1].flatten()[0])**2)
        attribute: Any = getattr(self.norm, 'eps', None)
        if _is_number(attribute) and abs(eps - attribute) <= 1e-12 * eps:
            return float(attribute)
        # The decimal number that rounding has blurred.
        return float(f'{eps:.14g}')

    def _reads_eps(self) -> bool:
        """Whether the forward takes the attribute ``eps`` as it is."""
        if not _is_number(getattr(self.norm, 'eps', None)):
            return False
        for eps in OTHER_EPS:
            vars(self.norm)['eps'] = eps
            if not self._computes(eps, 1):
                return False
        return True

    def _computes(self, eps: float, tries: int) -> bool:
        """Whether the formula with ``eps`` is what the forward computes."""
        generator = torch.Generator('cpu').manual_seed(0)
        return all(
            case.is_computed(self._run(case.x, training, needs_grad,
                                       case.buffers))
            for case in (Case(self.channels, i, eps, generator)
                         for i in range(tries))
            for training in (True, False) for needs_grad in (True, False))

    def _ends_in_children(self) -> bool:
        """Whether its own modules are called as those that note it were."""
        if not self.children:
            return True
        # Large enough for what pools.
        x = torch.linspace(-1, 1, 64 * self.channels, dtype=torch.float64,
                           device='cpu').view(1, -1, 8, 8)
        buffers = [self._full(value) for value in (1.5, .5, .2, .7)]
        return all(
            torch.equal(self._with_copies(x, training, buffers, True),
                        self._with_copies(x, training, buffers, False))
            for training in (True, False))

    def _with_copies(self, x: Tensor, training: bool, buffers: list[Tensor],
                     whole: bool) -> Tensor:
        """Run the whole forward, or the formula and then the children."""
        norm = bare_copy(self.norm)
        copies = {name: _unhooked_copy(module).train(training)
                  for name, module in self.children.items()}
        vars(norm).update(
            _buffers=dict(norm._buffers, **dict(zip(BUFFERS, buffers))),
            training=training)
        if whole:
            vars(norm)['_modules'] = copies
        torch.random.default_generator.manual_seed(0)
        output = self.norm_type.forward(norm, x.clone())
        for name in () if whole else self.rest or ():
            output = copies[name](output)
        return output

    def _chain(self, output: Tensor) -> tuple[str, ...] | None:
        """The modules called one after the other, None for another way."""
        given = [call.given for call in self.calls[1:]] + [output]
        if self.calls and any(
                after is not call.returned
                for after, call in zip(given, self.calls)):
            return None
        return tuple(call.name for call in self.calls)

    def _full(self, value: float) -> Tensor:
        return torch.full((self.channels, ), value, dtype=torch.float64,
                          device='cpu')

    def _run(self, x: Tensor, training: bool, needs_grad: bool,
             values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
        """Give input and output; None where something else changes too."""
        buffers = dict(zip(BUFFERS, (value.clone() for value in values)))
        if self.counts:
            buffers['num_batches_tracked'] = torch.zeros(
                (), dtype=torch.long, device='cpu')
        given, norm = dict(buffers), self.norm
        before = copy.deepcopy(_attributes(norm))
        vars(norm).update(_buffers=buffers, training=training)
        given_x = x.clone().requires_grad_(needs_grad)
        self.calls.clear()
        with torch.device('cpu'):
            output = self.norm_type.forward(norm, given_x)
        chain = self._chain(output)
        if self.rest is None:
            self.rest = chain
        unchanged = (
            chain is not None and chain == self.rest
            and _attributes(norm) == before and norm._buffers is buffers
            and buffers.keys() == given.keys()
            and all(buffers[name] is given[name] for name in given)
            and all(torch.equal(buffers[name], value)
                    for name, value in zip(BUFFERS, values))
            and torch.equal(given_x.detach(), x))
        if not (unchanged and type(output) is Tensor
                and output.dtype == x.dtype and output.shape == x.shape
                and output.requires_grad == needs_grad):
            return None
        return given_x, output


class _CallOfChild(NamedTuple):
    """A call of a module of a normalization, with one tensor."""

    name: str
    given: Tensor
    returned: Tensor


class _Noting(nn.Module):
    """Stands in for a module of a normalization; notes its calls.

    Args:
        name (str): Of the module.
        calls (list[_CallOfChild]): Where they are noted.
    """

    def __init__(self, name: str, calls: list[_CallOfChild]) -> None:
        super().__init__()
        self.name = name
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        """Give a tensor like ``x`` that is known again."""
        returned = x.clone()
        self.calls.append(_CallOfChild(self.name, x, returned))
        return returned


def _unhooked_copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module).to('cpu', torch.float64)
    for part in copied.modules():
        for name in (*HOOKS, *BACKWARD_HOOKS):
            vars(part)[name].clear()
    return copied


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """Nothing of the modes that the caller has set, nor random numbers."""
    with (torch.random.fork_rng([]), _disable_current_modes(),
          torch.inference_mode(False), torch.enable_grad(),
          torch.autocast('cpu', enabled=False)):
        yield
