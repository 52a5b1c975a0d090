"""What a convolution and the normalization after it do differently.

Both hang on the instance (see :mod:`mmtune.utils.attach`), so that the classes of a
model stay what they were:

- the convolution, where a run of its block allows it to wait, returns a
  :class:`~mmtune.behaviours.deferred.DeferredConv`, a promise that holds the module and
  its input;
- the normalization, given a promise while its statistics are fixed, runs the
  two as one convolution.

A pre-hook does the work, and the forward on the instance lets its result
through. Anything else that touches a promise makes it run the plain
convolution, so that the result is the stock one whatever the control flow.
"""
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack

from mmtune.utils.attach import (
    Hook,
    Override,
    TunedRepr,
    attach,
    has_hooks,
    heal,
    run_last,
)
from mmtune.behaviours.buffers import ConvBuffers, NamedBuffers
from mmtune.layers.calls import is_own_batch_norm
from mmtune.behaviours.deferred import (
    DeferredConv,
    call_of,
    inside_autograd_function,
    is_deferred,
    settle,
)
from mmtune.behaviours.folding import (
    FoldablePair,
    HalfRange,
    foldable_pair,
    follows,
    inside_backward,
)
from mmtune.functional.fold import native_node
from mmtune.layers.kinds import ConvKind, NormKind, conv_kind, methods_of, patched
from mmtune.behaviours.known import CALL, know
from mmtune.behaviours.blocks import COMPILING, BlockRun, BlockState, runs, thread

__all__ = ['ConvState', 'NormState', 'attach_conv', 'attach_norm']

# Without the native node a fold costs some twenty short operations and ten
# passes over the weight; it spares backward one feature map and the
# normalization's passes over it. Where the map has fewer elements than this,
# or than this share of the weight, the stock modules take less time.
SMALL_MAP = 65536
SMALL_SHARE = 1 / 8

# By thread, what a pre-hook hands to the forward on the instance that runs
# next: that forward, the module, its arguments, and the output, None where the
# stock forward is to run.
_PASSED: dict[int, tuple] = {}


class Forward(Override):
    """Lets the result of the pre-hook through, or runs the stock forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and type(args[0]) is DeferredConv:
            deferred = args[0]
            if deferred.handed is not None and deferred.handed[0] is self:
                return deferred.take()
        passed = _PASSED.pop(thread(), None)
        if passed is None or passed[0] is not self:
            return self.run_stock(self.module, settle(args), settle(kwargs))
        _, module, made_of, output = passed
        # Another hook may have changed the arguments since.
        if (output is not None and not kwargs and len(args) == len(made_of)
                and all([new is old for new, old in zip(args, made_of)])):
            return output
        return self.run_stock(module, args, kwargs)

    def run_stock(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Run the forward that the class has now."""
        return type(module).forward(module, *args, **kwargs)


def _positional(module: nn.Module, args: tuple,
                kwargs: dict) -> tuple[tuple, dict]:
    """Write arguments given by name in their places, where that is all."""
    code = getattr(type(module).forward, '__code__', None)
    if code is None:
        return args, kwargs
    names = code.co_varnames[1 + len(args):1 + len(args) + len(kwargs)]
    if set(names) != set(kwargs):
        return args, kwargs
    return (*args, *[kwargs[name] for name in names]), {}


class _LayerState:
    """What the states of convolutions and normalizations have in common.

    Attributes:
        name (str): Name of the layer, for messages.
        kind (ConvKind | NormKind): Its kind.
        code (tuple, optional): The functions that it is known by; None where
            others were in their place when it was turned on.
        methods (frozenset[str]): What must not be replaced on the instance.
        is_on (bool): Whether it was not turned off.
    """

    def __init__(self, name: str, layer: nn.Module, kind: Any) -> None:
        self.name = name
        self.kind = kind
        # What a lazy layer turns into in its first call.
        final = getattr(layer, 'cls_to_become', None) or type(layer)
        self.code = None if patched(type(layer), kind) else kind.code(final)
        self.methods = methods_of(type(layer))
        self.is_on = True

    def is_stock(self, layer: nn.Module) -> bool:
        """Whether a layer runs the code that it is known by."""
        # A view goes through the shorter of the two.
        return (not layer.__dict__.keys() & self.methods
                and self.code == self.kind.code(type(layer)))


# --------------------------------------------------------------------------
# The convolution
# --------------------------------------------------------------------------


class ConvState(_LayerState):
    """State of a convolution that is followed by a normalization.

    Attributes:
        norm (nn.Module): The normalization that folded it last.
        norm_kind (NormKind): Kind of that normalization.
        coeff_shape (tuple[int, ...], optional): In which a number for each
            output channel multiplies the weight; None where it is not known.
        least_input (int): From how many elements of its input on the
            convolution is not small.
        deferred (bool): Whether the latest call that was not small deferred,
            or could have.
        stays_inside (bool): Whether an autograd function that called the
            convolution was seen to call the normalization as well.
    """

    kind: ConvKind

    def __init__(self, name: str, conv: nn.Module, norm: nn.Module,
                 norm_kind: NormKind) -> None:
        super().__init__(name, conv, conv_kind(type(conv)))
        kind = self.kind
        self.norm = norm
        self.norm_kind = norm_kind
        shape = kind.shape(conv)
        self.coeff_shape = None if 0 in shape else kind.coeff_shape(
            conv, shape)
        self.least_input = _least_input(conv, kind)
        self.deferred = False
        self.stays_inside = False

    def note_fold(self, norm: nn.Module, kind: NormKind,
                  coeff_shape: tuple[int, ...]) -> None:
        """Remember what the convolution was folded with."""
        self.norm, self.norm_kind = norm, kind
        self.coeff_shape = coeff_shape

    def is_small(self, x: Any) -> bool:
        """Whether the stock modules are cheaper for the current call."""
        if torch.compiler.is_compiling():
            # A fold is a few kernels there, and a question to the size another
            # graph.
            return False
        return (isinstance(x, Tensor) and x.numel() < self.least_input
                and native_node(x, x) is None)

    def promise(self, conv: nn.Module, inputs: tuple, key: int) -> Any:
        """Promise the output, or a list of them; None where it must run."""
        x = inputs[0]
        run = self._run_of_call(conv, x, key)
        if run is None:
            return None
        inside_function = inside_autograd_function()
        if self.kind.gives_list:
            return [
                run.promise(
                    call_of(self.name, branch, kind, branch_inputs[0]),
                    branch_inputs, inside_function)
                for kind, branch, branch_inputs in self.kind.branches(
                    conv, *inputs)
            ]
        if not isinstance(x, Tensor):
            return None
        # A lazy layer that was loaded goes on to have none.
        channels = conv.__dict__.get('in_channels')
        if channels and x.dim() > 1 and x.size(1) != channels:
            # Stock's error comes from the convolution, not later.
            return None
        return run.promise(
            call_of(self.name, conv, self.kind, x), inputs, inside_function)

    def promise_again(self, conv: nn.Module, x: Any, key: int) -> Any:
        """Promise what was promised before, where nothing has changed.

        Args:
            conv (nn.Module): The convolution.
            x: Its only argument.
            key (int): The thread.

        Returns:
            DeferredConv | None: None where all has to be checked.
        """
        run = runs(key)
        if run is None or run.inside_function:
            return None
        known = run.state.known.get(conv)
        if known is None or not known.holds(x):
            return None
        self.deferred = True
        return run.promise(known.pair.call, (x, ), known=known)

    def _run_of_call(self, conv: nn.Module, x: Any,
                     key: int) -> BlockRun | None:
        """The run that the current call may make a promise in, if any."""
        run = runs(key)
        while run is not None and not _waits(run, conv, self, x):
            run = run.outer
        if run is None and inside_backward():
            # An activation checkpoint runs a part of the block's forward
            # anew, and has to meet there what it met the first time.
            if not self.deferred or why_not_defer(conv, self, self.norm, x):
                return None
            run = BlockRun(conv, BlockState(), [], None, key)
            # Nobody else would settle what a hook in backward asks for.
            torch.autograd.Variable._execution_engine.queue_callback(
                functools.partial(run.finish, None))
            return run
        if run is None:
            # What is small here is small when it runs anew.
            self.deferred = self.deferred and self.is_small(x)
            return None
        # A promise made inside an autograd function (a checkpoint is one)
        # could leave it, without its gradient.
        self.deferred = (not _inside_transform() and (
            self.stays_inside
            or run.inside_function == inside_autograd_function()))
        return run if self.deferred else None


def _waits(run: BlockRun, conv: nn.Module, state: ConvState, x: Any) -> bool:
    """Whether a normalization in a run waits for the convolution."""
    for own, norm in run.pairs:
        norm_state = norm.__dict__.get('_tune_norm')
        if own is conv and norm_state is not None:
            norm_state.why_stock = why_not_defer(conv, state, norm, x)
            if norm_state.why_stock is None:
                return True
    return False


def why_not_defer(conv: nn.Module, state: ConvState, norm: nn.Module,
                  x: Any) -> str | None:
    """Why a convolution has to run before its normalization is called.

    Args:
        conv (nn.Module): The convolution that is called.
        state (ConvState): Its state.
        norm (nn.Module): The normalization that follows it in its block.
        x: First argument of the call.

    Returns:
        str | None: None where it may wait.
    """
    if not norm._tune_norm.kind.is_fixed(norm):
        return 'train mode'
    if (conv._forward_hooks or conv._backward_hooks
            or conv._backward_pre_hooks
            # Another could make the weight anew, as spectral_norm's does.
            or (len(conv._forward_pre_hooks) != 1
                and [*conv._forward_pre_hooks.values()][-1] is not call_conv)
            or len(norm._forward_pre_hooks) != 1
            or norm._backward_hooks or norm._backward_pre_hooks
            or (norm._forward_hooks and has_hooks(norm))
            or _has_any_global_hook()):
        return 'a hook sees what passes between the two'
    if (type(norm.__dict__.get('forward')) is not Forward
            or not state.is_stock(conv)):
        return 'a method of the two was replaced'
    if type(x) is not Tensor and follows(x):
        return 'a tensor of its own type follows what is done to it'
    return 'small' if state.is_small(x) else None


def _inside_transform() -> bool:
    """Whether something follows tensors that must meet stock modules."""
    if torch.compiler.is_compiling():
        return False
    return (torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None
            or (nn.Module.__call__, nn.Module._call_impl) != CALL
            or torch._C._len_torch_function_stack() > 0
            and not all(type(mode).__module__.startswith('torch.')
                        for mode in _get_current_function_mode_stack()))


def _least_input(conv: nn.Module, kind: ConvKind) -> int:
    """From how many elements of its input on a convolution is not small.

    0 for one that does not know its channels yet.
    """
    weight_size = math.prod(kind.shape(conv))
    if weight_size == 0:
        return 0
    map_size = max(SMALL_MAP, SMALL_SHARE * weight_size)
    return math.ceil(map_size / kind.outputs_per_input(conv))


class ConvForward(Forward):
    """:class:`Forward` of a convolution."""

    def run_stock(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Run the stock forward; tell the normalization who did."""
        output = super().run_stock(module, args, kwargs)
        if inside_autograd_function() and isinstance(output, Tensor):
            output._tune_conv = vars(module).get('_tune_conv')
        return output


@Hook
def call_conv(conv: nn.Module, args: tuple,
              kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a convolution: promise its output, or not."""
    if kwargs is None:
        return None
    own = conv.__dict__
    state = own.get('_tune_conv')
    key = thread()
    if (key != COMPILING and state is not None and len(args) == 1
            and not kwargs):
        output = state.promise_again(conv, args[0], key)
        if output is not None:
            output.handed = own['forward'], None
            return (output, ), {}
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        args, kwargs = settle(args), settle(kwargs)
        if kwargs:
            args, kwargs = _positional(conv, args, kwargs)
    if type(own.get('forward')) is not ConvForward:
        heal(conv, 'forward', ConvForward)
        return args, kwargs
    output = None
    if state is not None and args and not kwargs:
        output = state.promise(conv, args, key)
        if output is None:
            run_last(conv, call_conv)
    _PASSED[key] = own['forward'], conv, args, output
    return args, kwargs


def attach_conv(name: str, conv: nn.Module, norm: nn.Module,
                norm_kind: NormKind) -> ConvState:
    """Make a convolution wait for its normalization.

    Args:
        name (str): Name of the convolution, for errors.
        conv (nn.Module): Of a known kind.
        norm (nn.Module): A normalization that follows it.
        norm_kind (NormKind): Kind of the normalization.

    Returns:
        ConvState: The one that it has already, where it has.
    """
    state = vars(conv).get('_tune_conv')
    if state is None:
        state = ConvState(name, conv, norm, norm_kind)
        attach(
            conv,
            call_conv,
            overrides=dict(
                forward=ConvForward,
                named_buffers=NamedBuffers,
                extra_repr=TunedRepr),
            _tune_conv=state,
            _buffers=ConvBuffers(conv._buffers, state))
    return state


# --------------------------------------------------------------------------
# The normalization
# --------------------------------------------------------------------------


class NormState(_LayerState):
    """State of a normalization that folds.

    Attributes:
        ran (str, optional): How the latest forward ran: 'fused', 'stock',
            or 'train mode' (stock, with the statistics of the batch).
        why_stock (str, optional): Why the convolution did not wait.
        half_range (HalfRange): Whether float16 holds what it folds.
    """

    kind: NormKind

    def __init__(self, name: str, norm: nn.Module, kind: NormKind) -> None:
        super().__init__(name, norm, kind)
        self.ran: str | None = None
        self.why_stock: str | None = None
        self.half_range = HalfRange()

    def latest_run(self) -> str:
        """How the latest forward ran, see :func:`mmtune.api.latest_runs`."""
        if self.ran == 'stock' and self.why_stock == 'small':
            return 'small'
        return self.ran or 'not run'

    def fold(self, norm: nn.Module, deferred: Any) -> Tensor | None:
        """Run a promised convolution and the normalization as one.

        Args:
            norm (nn.Module): The normalization.
            deferred (DeferredConv): What it was given.

        Returns:
            Tensor | None: Shape (batch, out_channels, ...); None where the
            stock modules have to run.
        """
        if not self.is_stock(norm):
            return None
        pair = foldable_pair(norm, self.kind, self.half_range, deferred)
        if pair is None:
            return None
        _note_fold(pair)
        if not torch.compiler.is_compiling():
            _remember(pair, deferred)
        return pair.run(deferred.inputs)

    def fold_again(self, norm: nn.Module, deferred: Any) -> Tensor | None:
        """Fold what was folded before, where nothing has changed.

        Args:
            norm (nn.Module): The normalization.
            deferred (DeferredConv): What it was given.

        Returns:
            Tensor | None: None where all has to be checked.
        """
        known = deferred.known
        if (known is None or known.pair.norm is not norm
                or deferred.output is not None
                or not known.holds(deferred.inputs[0]) or deferred.changed()):
            return None
        _note_fold(known.pair)
        return known.run(*deferred.inputs)

    def receive(self, norm: nn.Module, promise: Any, *args: Any,
                **kwargs: Any) -> Tensor | None:
        """Fold where the forward of a normalization calls ``F.batch_norm``.

        Args:
            norm (nn.Module): The normalization.
            promise (DeferredConv): What its forward was given, and the call.
            *args: Other arguments of the call.
            **kwargs: Other arguments of the call.

        Returns:
            Tensor | None: See :meth:`fold`.
        """
        if not is_own_batch_norm(norm, *args, **kwargs):
            return None
        output = self.fold(norm, promise)
        if output is not None:
            _note_fused(self, promise, output)
        return output


def _note_fold(pair: FoldablePair) -> None:
    state = vars(pair.call.conv).get('_tune_conv')
    if state is not None:
        state.note_fold(pair.norm, pair.norm_kind, pair.coeff_shape)


def _remember(pair: FoldablePair, deferred: Any) -> None:
    """Spare the next call of a pair that was checked in full just now."""
    conv, norm, run = pair.call.conv, pair.norm, deferred.run
    x = deferred.inputs[0]
    if (run is None or run.inside_function or inside_backward()
            or inside_autograd_function() or _inside_transform()
            # A shallow copy shares its block's state.
            or any(vars(layer)['forward'].module is not layer
                   for layer in (conv, norm) if 'forward' in vars(layer))
            or (conv, norm) not in run.state.pairs_in(run.block, False)
            # What has changed since the convolution was called.
            or why_not_defer(conv, conv._tune_conv, norm, x)):
        return
    known = know(run.state.facts(run.block), pair, x)
    if known is not None:
        run.state.known[conv] = known


@Hook
def call_norm(norm: nn.Module, args: tuple,
              kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a normalization: fold what it is given, or not."""
    if kwargs is None:
        return None
    own = norm.__dict__
    state = own.get('_tune_norm')
    if state is None:
        return settle(args), settle(kwargs)
    if len(args) == 1 and not kwargs and type(args[0]) is DeferredConv:
        output = state.fold_again(norm, args[0])
        if output is not None:
            _note_fused(state, args[0], output)
            output = state.kind.finish(norm, output)
            args[0].handed = own['forward'], output
            return None
    if type(own.get('forward')) is not Forward:
        heal(norm, 'forward', Forward)
        args, kwargs = settle(args), settle(kwargs)
        _note_stock(norm, state, args)
        return args, kwargs
    if kwargs:
        args, kwargs = _positional(norm, args, kwargs)
    output = None
    if len(args) == 1 and is_deferred(args[0]) and not kwargs:
        if not state.kind.runs_forward:
            output = state.fold(norm, args[0])
        elif thread() != COMPILING and state.is_stock(norm):
            # The fold waits until the forward calls F.batch_norm.
            state.ran = 'stock'
            args[0].receiver = functools.partial(state.receive, norm)
            _PASSED[thread()] = own['forward'], norm, args, None
            return args, kwargs
    if output is not None:
        _note_fused(state, args[0], output)
        output = state.kind.finish(norm, output)
    else:
        args, kwargs = settle(args), settle(kwargs)
        _note_stock(norm, state, args)
    _PASSED[thread()] = own['forward'], norm, args, output
    return args, kwargs


def _note_fused(state: NormState, deferred: Any, output: Tensor) -> None:
    state.ran = 'fused'
    deferred.folded = output.requires_grad


def _note_stock(norm: nn.Module, state: NormState, args: tuple) -> None:
    state.ran = 'stock' if state.kind.is_fixed(norm) else 'train mode'
    if inside_autograd_function() and args and not args[0].requires_grad:
        # With a gradient it would come from outside of the function.
        conv_state = getattr(args[0], '_tune_conv', None)
        if conv_state is not None:
            conv_state.stays_inside = conv_state.deferred = True


def attach_norm(name: str, norm: nn.Module, kind: NormKind) -> NormState:
    """Make a normalization fold the convolutions that wait for it.

    Args:
        name (str): Name of the normalization, for messages.
        norm (nn.Module): Of a known kind.
        kind (NormKind): That kind.

    Returns:
        NormState: The one that it has already, where it has.
    """
    state = vars(norm).get('_tune_norm')
    if state is None:
        state = NormState(name, norm, kind)
        attach(
            norm,
            call_norm,
            overrides=dict(forward=Forward, extra_repr=TunedRepr),
            _tune_norm=state)
    return state
