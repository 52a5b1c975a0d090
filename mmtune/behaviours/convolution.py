"""What a convolution does differently: it waits for its normalization.

Where a run of its block allows it to wait, it returns a
:class:`~mmtune.behaviours.deferred.DeferredConv`, a promise that holds the
module and its input.
"""
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from mmtune.behaviours.blocks import (
    COMPILING,
    BlockRun,
    BlockState,
    runs,
    thread,
)
from mmtune.behaviours.buffers import ConvBuffers, NamedBuffers
from mmtune.behaviours.calls import call_of
from mmtune.behaviours.deferred import inside_autograd_function, settle
from mmtune.behaviours.folding import follows, inside_backward
from mmtune.behaviours.forward import (
    PASSED,
    Forward,
    LayerState,
    positional,
)
from mmtune.behaviours.known import CALL, GLOBAL_HOOKS
from mmtune.functional.fold import native_node
from mmtune.layers.convolutions import conv_kind
from mmtune.layers.kinds import ConvKind, NormKind
from mmtune.utils.attach import (
    Hook,
    TunedRepr,
    attach,
    has_hooks,
    heal,
    run_last,
)
from mmtune.utils.transforms import in_transform

__all__ = ['ConvState', 'attach_conv', 'inside_transform', 'why_not_defer']

# Without the native node a fold costs some twenty short operations and ten
# passes over the weight; it spares backward one feature map and the
# normalization's passes over it. Where the map has fewer elements than this,
# or than this share of the weight, the stock modules take less time.
SMALL_MAP = 65536
SMALL_SHARE = 1 / 8


class ConvState(LayerState):
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
        self.deferred = (not inside_transform() and (
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
            or any([hooks for hooks, _ in GLOBAL_HOOKS])):
        return 'a hook sees what passes between the two'
    if (type(norm.__dict__.get('forward')) is not Forward
            or not state.is_stock(conv)):
        return 'a method of the two was replaced'
    if type(x) is not Tensor and follows(x):
        return 'a tensor of its own type follows what is done to it'
    return 'small' if state.is_small(x) else None


def inside_transform() -> bool:
    """Whether something follows tensors that must meet stock modules."""
    if torch.compiler.is_compiling():
        return False
    return (in_transform()
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
            args, kwargs = positional(conv, args, kwargs)
    if type(own.get('forward')) is not ConvForward:
        heal(conv, 'forward', ConvForward)
        return args, kwargs
    output = None
    if state is not None and args and not kwargs:
        output = state.promise(conv, args, key)
        if output is None:
            run_last(conv, call_conv)
    PASSED[key] = own['forward'], conv, args, output
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
