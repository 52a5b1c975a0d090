"""The output of a convolution that has not run yet."""
import contextlib
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmtune.attach import bare_copy
from mmtune.kinds import ConvKind, parameter
from mmtune.questions import answer

__all__ = [
    'CompiledDeferredConv', 'DeferredConv', 'defer', 'fingerprint',
    'inside_autograd_function', 'is_deferred', 'settle'
]

ADVICE = ('leave its block out by naming the other submodules in the '
          '`modules` argument of `mmtune.turn_on`')
# What the forward of a convolution reads beside its parameters.
SETTINGS = ('stride', 'padding', 'dilation', 'groups', 'padding_mode')
# Older versions of torch do not tell.
_is_any_autocast_enabled = getattr(
    torch._C, '_is_any_autocast_enabled', lambda: True)
_get_settings = operator.itemgetter(*SETTINGS)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives convolutions here, None where off."""
    if (torch.amp.is_autocast_available(device_type)
            and torch.is_autocast_enabled(device_type)):
        return torch.get_autocast_dtype(device_type)
    return None


def fingerprint(tensor: Any) -> tuple:
    """What tells that a tensor was changed: its version and its memory.

    Args:
        tensor: A tensor; anything else has no fingerprint.

    Returns:
        tuple[int | None, int | None]: Version and address. Either is None
        where it cannot be asked: inference tensors count no versions, and
        tensors that are not plain may have no memory.
    """
    if tensor is None:
        return None, None
    kind = type(tensor)
    if kind is not Tensor and kind is not nn.Parameter:
        version = getattr(tensor, '_version', None)
        return version, None
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # an inference tensor
        return None, tensor.data_ptr()


def _differs(before: tuple, now: tuple) -> bool:
    return any(old is not None and new is not None and old != new
               for old, new in zip(before, now))


class _Deferred:
    """What :class:`DeferredConv` holds, and how it runs in the end.

    Attributes:
        conv_name (str): Name of the convolution, for errors.
        conv (nn.Module): The convolution.
        kind (ConvKind): Kind of the convolution.
        inputs (tuple): What it was called with; first a tensor of shape
            (batch, in_channels, ...).
        weight, bias, settings, context, fingerprints: What the convolution
            had when it was called.
        output (Tensor, optional): Of the plain convolution, once it ran.
        folded (bool): Whether a normalization ran with it, for a gradient.
        receiver (Callable, optional): Takes a call of ``F.batch_norm`` with
            the promise; gives None where that has to run.
        run (BlockRun, optional): The run of a block that it was made in.
    """

    # None of these may be the name of an attribute of tensors.
    conv_name: str
    conv: nn.Module
    kind: ConvKind
    inputs: tuple
    output: Tensor | None
    receiver: Callable | None = None
    run: Any = None

    def _begin(self, name: str, conv: nn.Module, kind: ConvKind,
               inputs: tuple) -> None:
        self.conv_name = name
        self.conv = conv
        self.kind = kind
        self.inputs = inputs
        self.weight = kind.weight(conv)
        self.bias = parameter(conv, 'bias')
        self.settings = self._current_settings()
        self.inside_function = inside_autograd_function()
        self.context = self._current_context()
        self.fingerprints = self._current_fingerprints()
        self.output = None
        self.folded = False

    def _current_context(self) -> tuple:
        return (torch.is_grad_enabled(),
                _autocast_dtype(self.inputs[0].device.type))

    def _current_settings(self) -> tuple:
        own = self.conv.__dict__
        return tuple([own.get(name) for name in SETTINGS])

    def _current_fingerprints(self) -> list:
        raise NotImplementedError

    def _changed(self) -> bool:
        now = self._current_fingerprints()
        return self.fingerprints != now and any(
            map(_differs, self.fingerprints, now))

    def output_shape(self) -> tuple[int, ...] | None:
        """The shape of the output, None where it is not known."""
        return self.kind.output_shape(self.conv, self.weight, *self.inputs)

    def foldable(self) -> bool:
        """Whether a fold would see what the convolution was given."""
        return (self.output is None and self.context == self._current_context()
                and self.settings == self._current_settings()
                and not self._changed())

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
            self.output = self._run()
        return self.output

    def _run(self) -> Tensor:
        grad_enabled, autocast_dtype = self.context
        if self._changed():
            raise RuntimeError(
                f'The input or a parameter of {self.conv_name!r} was changed '
                'in place between its call and the use of its output; '
                f'{ADVICE}')
        inside_function = inside_autograd_function()
        if (grad_enabled if inside_function else self.inside_function):
            raise RuntimeError(
                f'The output of {self.conv_name!r} went '
                f'{"into" if inside_function else "out of"} a '
                '`torch.autograd.Function` where its normalization was '
                f'expected; {ADVICE}')
        conv = self.conv
        if self.settings != self._current_settings():
            conv = bare_copy(conv)
            vars(conv).update(zip(SETTINGS, self.settings))
        with contextlib.ExitStack() as stack:
            if grad_enabled != torch.is_grad_enabled():
                stack.enter_context(torch.set_grad_enabled(grad_enabled))
            device_type = self.inputs[0].device.type
            if autocast_dtype != _autocast_dtype(device_type):
                stack.enter_context(
                    torch.autocast(
                        device_type,
                        autocast_dtype,
                        enabled=autocast_dtype is not None))
            return self.kind.run(conv, self.weight, self.bias, *self.inputs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _OF_ITS_GRADIENT:
            for value in tree_leaves((args, kwargs)):
                if is_deferred(value) and value.folded:
                    raise RuntimeError(
                        f'The gradient of the output of {value.conv_name!r} '
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

    def _current_context(self) -> tuple:
        if _is_any_autocast_enabled():
            return super()._current_context()
        return torch.is_grad_enabled(), None

    def _current_settings(self) -> tuple:
        try:
            return _get_settings(self.conv.__dict__)
        except KeyError:  # a linear layer, say
            return super()._current_settings()

    def _current_fingerprints(self) -> list:
        return [
            fingerprint(t) for t in (*self.inputs, self.weight, self.bias)
        ]

    @classmethod
    def _without_running(cls, func: Callable, args: tuple,
                         kwargs: dict) -> Any:
        promise = next(filter(is_deferred, args), None)
        if promise is None or not promise.foldable():
            return None
        if (func is F.batch_norm and promise.receiver is not None
                and args[0] is promise):
            return promise.receiver(*args, **kwargs)
        if func in (Tensor.flatten, torch.flatten) and args[0] is promise:
            return promise.flattened(*args[1:], **kwargs)
        return answer(promise, func, args, kwargs)

    def flattened(self, start_dim: int = 0,
                  end_dim: int = -1) -> 'DeferredConv | None':
        """Promise the flattened output, where the input may be as well."""
        inputs = self.kind.flattened(*self.inputs, start_dim=start_dim,
                                     end_dim=end_dim)
        if inputs is None or self.run is None:
            return None
        promise = _new(inputs[0])
        vars(promise).update(vars(self), inputs=inputs)
        promise.fingerprints = promise._current_fingerprints()
        self.run.promises.append(weakref.ref(promise))
        return promise

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Below Python's functions, where a gradient would be lost.
        name = next(a.conv_name for a in (*args, *(kwargs or {}).values())
                    if type(a) is cls)
        raise RuntimeError(
            f"The output of {name!r} went into code below PyTorch's Python "
            f'functions where its normalization was expected; {ADVICE}')


class CompiledDeferredConv(_Deferred):
    """A :class:`DeferredConv` for ``torch.compile``.

    Which makes no subclass of tensors. It is no tensor to whoever asks for
    its type.
    """

    def _current_fingerprints(self) -> list:
        # Not to be known there: the trace has to be believed.
        return []


def defer(name: str, conv: nn.Module, kind: ConvKind, inputs: tuple) -> Any:
    """Promise the output of a convolution.

    Args:
        name (str): Name of the convolution, for errors.
        conv (nn.Module): The convolution.
        kind (ConvKind): Kind of the convolution.
        inputs (tuple): What it was called with; first a tensor of shape
            (batch, in_channels, ...).

    Returns:
        DeferredConv | CompiledDeferredConv: Stands in for the output.
    """
    deferred: Any
    if torch.compiler.is_compiling():
        deferred = CompiledDeferredConv()
    else:
        deferred = _new(inputs[0])
    deferred._begin(name, conv, kind, inputs)
    return deferred


def _new(x: Tensor) -> Any:
    # The size is nobody's to see: it would have to be computed.
    return Tensor._make_wrapper_subclass(
        DeferredConv, (), dtype=x.dtype, device=x.device)


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
        return value.tensor() if run in (None, value.run) else value
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
