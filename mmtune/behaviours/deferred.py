"""The output of a convolution that has not run yet."""
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmtune.behaviours.calls import Call, fingerprints
from mmtune.layers.questions import answer

__all__ = [
    'CompiledDeferredConv', 'DeferredConv', 'defer',
    'inside_autograd_function', 'is_deferred', 'settle'
]

ADVICE = ('leave its block out by naming the other submodules in the '
          '`modules` argument of `mmtune.turn_on`')

class _Deferred:
    """What :class:`DeferredConv` holds, and how it runs in the end.

    Attributes:
        call (Call): The convolution as it was when it was called.
        inputs (tuple): What it was called with; first a tensor of shape
            (batch, in_channels, ...).
        fingerprints: Of the inputs, the weight and the bias at the call.
        inside_function (bool): Whether an autograd function made the call.
        output (Tensor, optional): Of the plain convolution, once it ran.
        folded (bool): Whether a normalization ran with it, for a gradient.
        run (BlockRun, optional): Of the block in which it was made; None
            where that was compiled.
    """

    # None of these may be the name of an attribute of tensors.
    call: Call
    inputs: tuple
    fingerprints: Any
    inside_function: bool
    output: Tensor | None = None
    folded = False
    run: Any = None

    def changed(self) -> bool:
        """Whether input, weight or bias were changed since the call."""
        raise NotImplementedError

    def foldable(self) -> bool:
        """Whether a fold would see what the convolution was given."""
        return (self.output is None
                and self.call.context_is_same(self.inputs[0])
                and self.call.settings_are_same() and not self.changed())

    def tensor(self) -> Tensor:
        """Run the plain convolution, once.

        Returns:
            Tensor: Shape (batch, out_channels, ...).

        Raises:
            RuntimeError: If the input or the weight was changed in place
                since the convolution was called, or if the promise went into
                or out of a ``torch.autograd.Function``, which would lose its
                gradient.
        """
        if self.output is None:
            self._check()
            self.output = self.call.run(self.inputs)
        return self.output

    def _check(self) -> None:
        if self.changed():
            raise RuntimeError(
                f'The input or a parameter of {self.call.name!r} was changed '
                'in place between its call and the use of its output; '
                f'{ADVICE}')
        inside_function = inside_autograd_function()
        if (self.call.context[0]
                if inside_function else self.inside_function):
            raise RuntimeError(
                f'The output of {self.call.name!r} went '
                f'{"into" if inside_function else "out of"} a '
                '`torch.autograd.Function` where its normalization was '
                f'expected; {ADVICE}')

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _OF_ITS_GRADIENT:
            for value in tree_leaves((args, kwargs)):
                if is_deferred(value) and value.folded:
                    raise RuntimeError(
                        f'The gradient of the output of {value.call.name!r} '
                        'was asked for, which is not computed once its '
                        f'normalization ran with it; {ADVICE}')
        result = cls._without_running(func, args, kwargs or {})
        if result is not None:
            return result
        return func(*settle(args), **settle(kwargs or {}))

    @classmethod
    def _without_running(cls, func: Callable, args: tuple,
                         kwargs: dict) -> Any:
        """What a function gives, None where the convolution has to run."""
        return None


# What of a tensor its users only ask for where they want its gradient.
_OF_ITS_GRADIENT = {
    Tensor.retain_grad, Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook, torch.autograd.grad
}


class DeferredConv(_Deferred, Tensor):
    """The output of a convolution that has not run yet.

    A tensor to whoever asks for its type, without memory: every function,
    method and attribute of tensors sees the plain convolution's output,
    computed from what the convolution had when it was called. Made by
    :func:`defer`.
    """

    # What a pre-hook hands to the forward on the instance that runs next:
    # that forward, and its output, None for the promise itself.
    handed: tuple[Any, Any] | None = None
    # By what it is known.
    known: Any = None
    # Takes a call of F.batch_norm with the promise; gives None where that has
    # to run.
    receiver: Callable | None = None

    def take(self) -> Any:
        """Give what was handed, once."""
        assert self.handed is not None
        _, output = self.handed
        self.handed = None
        return self if output is None else output

    def current_fingerprints(self) -> Any:
        """What tells that input, weight or bias were changed."""
        if self.known is not None:
            return self.known.versions(*self.inputs)
        return fingerprints(*self.inputs, self.call.weight, self.call.bias)

    def changed(self) -> bool:
        """See :class:`_Deferred`."""
        return self.fingerprints != self.current_fingerprints()

    @classmethod
    def _without_running(cls, func: Callable, args: tuple,
                         kwargs: dict) -> Any:
        promise = next(filter(is_deferred, args), None)
        if promise is None or not promise.foldable():
            return None
        if args[0] is promise:
            if func is F.batch_norm and promise.receiver is not None:
                return promise.receiver(*args, **kwargs)
            if func in (Tensor.flatten, torch.flatten):
                return promise.flattened(*args[1:], **kwargs)
        return answer(promise, func, args, kwargs)

    def flattened(self, start_dim: int = 0,
                  end_dim: int = -1) -> 'DeferredConv | None':
        """Promise the flattened output, where the input may be as well.

        Args:
            start_dim (int): See ``Tensor.flatten``.
            end_dim (int): See ``Tensor.flatten``.

        Returns:
            DeferredConv | None: None where the convolution has to run.
        """
        inputs = self.call.kind.flattened(*self.inputs, start_dim=start_dim,
                                          end_dim=end_dim)
        if inputs is None or self.run is None:
            return None
        promise = defer(self.call, inputs, self.inside_function)
        promise.run = self.run
        self.run.promises.append(weakref.ref(promise))
        return promise

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Below Python's functions, where a gradient would be lost.
        name = next(a.call.name for a in (*args, *(kwargs or {}).values())
                    if type(a) is cls)
        raise RuntimeError(
            f"The output of {name!r} went into code below PyTorch's Python "
            f'functions where its normalization was expected; {ADVICE}')


class CompiledDeferredConv(_Deferred):
    """A :class:`DeferredConv` for ``torch.compile``.

    Which makes no subclass of tensors. It is no tensor to whoever asks for
    its type.

    Args:
        call (Call): See :func:`defer`, as for the others.
        inputs (tuple): What the convolution was called with.
        inside_function (bool): Always False there.
    """

    def __init__(self, call: Call, inputs: tuple,
                 inside_function: bool) -> None:
        self.call = call
        self.inputs = inputs
        self.inside_function = inside_function

    def changed(self) -> bool:
        """See :class:`_Deferred`."""
        # Not to be known there: the trace has to be believed.
        return False


def defer(call: Call, inputs: tuple, inside_function: bool = False,
          known: Any = None) -> DeferredConv:
    """Promise the output of a convolution.

    Args:
        call (Call): The convolution as it is now.
        inputs (tuple): What it was called with; first a tensor of shape
            (batch, in_channels, ...).
        inside_function (bool): See :func:`inside_autograd_function`.
        known (Known, optional): The pair, where it was checked before.

    Returns:
        DeferredConv: Stands in for the output.
    """
    x = inputs[0]
    # The size is nobody's to see: it would have to be computed.
    deferred: Any = Tensor._make_wrapper_subclass(
        DeferredConv, (), dtype=x.dtype, device=x.device)
    deferred.call = call
    deferred.inputs = inputs
    deferred.known = known
    deferred.fingerprints = deferred.current_fingerprints()
    deferred.inside_function = inside_function
    return deferred


def is_deferred(value: Any) -> bool:
    """Whether a value is what :func:`defer` returns."""
    return isinstance(value, _Deferred)


def inside_autograd_function() -> bool:
    """Tell ``Function.forward`` from a mere ``no_grad``."""
    # Both turn gradients off; forward-mode gradients only the first, and
    # inference mode.
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()
                or torch._C._is_fwd_grad_enabled()
                or torch.is_inference_mode_enabled())


def _delegate_to_tensor() -> None:
    """Give :class:`CompiledDeferredConv` every attribute of a tensor.

    One by one, since ``torch.compile`` cannot see through ``__getattr__``.
    """

    def method(name):

        def call(self, *args, **kwargs):
            return getattr(self.tensor(), name)(*settle(args),
                                                **settle(kwargs))

        return call

    def attribute(name):
        return property(lambda self: getattr(self.tensor(), name),
                        lambda self, value: setattr(self.tensor(), name,
                                                    value))

    own = {*vars(_Deferred), *vars(CompiledDeferredConv)} - {'__doc__'}
    lifecycle = {
        '__class__', '__class_getitem__', '__del__', '__delattr__', '__dir__',
        '__doc__', '__getattribute__', '__getstate__', '__init__',
        '__init_subclass__', '__new__', '__setattr__', '__sizeof__',
        '__subclasshook__'
    }
    for name in dir(Tensor):
        if name in own or name in lifecycle:
            continue
        delegate = method if callable(getattr(Tensor, name)) else attribute
        setattr(CompiledDeferredConv, name, delegate(name))
    # Defining `__eq__` takes the default `__hash__` away.
    setattr(CompiledDeferredConv, '__hash__', object.__hash__)  # noqa: B010


def settle(value: Any, run: Any = None) -> Any:
    """Replace each promise in (nested) containers by its tensor.

    Args:
        value: Anything; tuples, lists and dicts are searched.
        run (BlockRun, optional): Whose promises are replaced. Defaults to
            None: all are.

    Returns:
        The value itself where it holds no promise.
    """
    if is_deferred(value):
        if run is None or value.run is run:
            return value.tensor()
        return value
    if isinstance(value, (tuple, list)):
        settled = [settle(item, run) for item in value]
        if all(new is old for new, old in zip(settled, value)):
            return value
        if hasattr(value, '_fields'):
            return type(value)(*settled)
        return type(value)(settled)
    if isinstance(value, dict):
        settled_items = {
            key: settle(item, run) for key, item in value.items()
        }
        if all(settled_items[key] is value[key] for key in value):
            return value
        copied = value.copy()
        copied.update(settled_items)
        return copied
    return value


_delegate_to_tensor()
