"""What modules do differently: a block, its convolution, its normalization.

Three behaviours are given to modules that already exist, by swapping their
class for one that puts a mixin before the stock class:

- :class:`BlockScope`, the module whose forward calls the pair: inside that
  forward, and nowhere else, the pair's convolution may wait;
- :class:`DeferringConv`: returns a :class:`~mmtune.deferred.DeferredConv`, a
  promise that holds the module and its input;
- :class:`FoldingNorm`: given a promise while its statistics are fixed, it
  runs the block as one convolution.

Anything else that touches a promise makes it run the plain convolution, so
that the result is the stock one whatever the control flow.
"""
import functools
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from mmtune.deferred import (
    DeferredConv,
    fingerprint,
    inside_autograd_function,
    settle,
)
from mmtune.functional import (
    fold,
    fold_and_run,
    needs_gradient,
    norm_coefficients,
    run_folded,
)
from mmtune.kinds import ConvKind

__all__ = [
    'BUFFERS', 'BlockScope', 'Deferral', 'DeferringConv', 'FoldingNorm',
    'HeldNorm', 'NormState', 'Pair', 'put_buffers'
]

BUFFERS = ('weight_coeff', 'bias_delta')

# A fold costs some twenty short operations and ten passes over the weight; it
# spares backward one feature map and the normalization's passes over it. Where
# the map has fewer elements than this, or than this share of the weight, the
# stock modules take less time. The largest values by which the backbones of
# docs/en/cost.md still keep at most 1.01 times what Deploy keeps.
SMALL_MAP = 65536
SMALL_SHARE = 1 / 8

# How much a folded weight may change before it leaves float16's range, where
# numbers overflow or lose their digits, and how many folds may pass before it
# is looked at again.
HALF_MARGIN = 16
HALF_CHECK_INTERVAL = 64


def _inside_backward() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def _inside_transform() -> bool:
    """Whether something follows tensors that must meet stock modules."""
    if torch.compiler.is_compiling():
        return False
    return (torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None)


class Pair(NamedTuple):
    """A convolution and the normalization that follows it in one forward.

    Attributes:
        conv (nn.Module): The convolution.
        norm (nn.Module): The normalization.
        conv_path (tuple[str]): Where the block has the convolution.
        norm_path (tuple[str]): Where the block has the normalization.
    """

    conv: nn.Module
    norm: nn.Module
    conv_path: tuple[str, ...]
    norm_path: tuple[str, ...]

    def may_defer(self, block: nn.Module) -> bool:
        """Whether the norm can fold, and no hook sees what goes to it."""
        conv, norm = self.conv, self.norm
        # Else one of the two was replaced, wrapped or turned off.
        return (_at(block, self.conv_path) is conv
                and _at(block, self.norm_path) is norm
                and '_tune_state' in vars(norm)
                and norm._tune_state.kind.is_fixed(norm)
                and not (conv._forward_hooks or conv._backward_hooks
                         or conv._backward_pre_hooks
                         or norm._forward_pre_hooks or norm._backward_hooks
                         or _has_any_global_hook()))


def _at(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if module is not None:
            module = module._modules.get(name)
    return module


# By thread, the innermost block that runs now.
_RUNS: dict[int, 'BlockRun'] = {}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class BlockRun:
    """One run of a block's forward, and the promises made in it.

    Args:
        block (nn.Module): A :class:`BlockScope`.
        outer (BlockRun, optional): The run that this one is a part of.
    """

    __slots__ = ('block', 'inside_function', 'outer', 'promised', 'promises')

    def __init__(self, block: nn.Module, outer: 'BlockRun | None') -> None:
        self.block = block
        self.outer = outer
        self.inside_function = inside_autograd_function()
        self.promised = False
        self.promises: list[weakref.ref] = []

    def may_defer(self, conv: nn.Module) -> bool:
        """Whether a convolution called in this run may wait."""
        for pair in self.block._tune_pairs:
            if pair.conv is conv and pair.may_defer(self.block):
                return True
        return False

    def promise(self, name: str, kind: ConvKind, conv: nn.Module,
                inputs: tuple) -> DeferredConv:
        """Promise the output of a convolution called in this run."""
        deferred = DeferredConv(name, conv, kind, inputs)
        self.promised = True
        if not torch.compiler.is_compiling():
            self.promises.append(weakref.ref(deferred))
        return deferred

    def finish(self, output: Any) -> Any:
        """Let no promise outlive the block, wherever it was put."""
        output = settle(output)
        for reference in self.promises:
            deferred = reference()
            if deferred is not None:
                deferred.tensor()
        return output


class Deferral:
    """State of a :class:`DeferringConv`.

    Attributes:
        name (str): Of the convolution, for errors.
        kind (ConvKind): How the convolution runs.
        least_input (int): From how many elements of its input on the
            convolution is not small.
        least_kept (int): The same where the fold costs nothing.
        keeps_fold (bool): Whether the normalization keeps it.
        small (bool): Whether the latest call was not worth a fold.
        deferred (bool): Whether the latest call in a forward deferred, or
            could have.
        stays_inside (bool): Whether an autograd function that called the
            convolution was seen to call the normalization as well.
    """

    def __init__(self, name: str, kind: ConvKind, conv: nn.Module) -> None:
        self.name = name
        self.kind = kind
        self.least_input = _least_input(conv, kind, SMALL_SHARE)
        self.least_kept = _least_input(conv, kind, 0)
        self.keeps_fold = False
        self.small = False
        self.deferred = False
        self.stays_inside = False

    def is_small(self, x: Any) -> bool:
        """Whether the stock modules are cheaper for a call of now."""
        kept = self.keeps_fold and not torch.is_grad_enabled()
        least = self.least_kept if kept else self.least_input
        self.small = isinstance(x, Tensor) and x.numel() < least
        return self.small

    def run_of_call(self, conv: nn.Module) -> BlockRun | None:
        """The run that a call of now may make a promise in, if any."""
        run = _RUNS.get(_thread())
        while run is not None and not run.may_defer(conv):
            run = run.outer
        if run is None and _inside_backward():
            # An activation checkpoint runs a part of the block's forward
            # anew, and has to meet there what it met the first time.
            return BlockRun(conv, None) if self.deferred else None
        # A promise made inside an autograd function (a checkpoint is one)
        # could leave it, without its gradient.
        self.deferred = (
            run is not None and not _inside_transform()
            and (self.stays_inside
                 or run.inside_function == inside_autograd_function()))
        return run if self.deferred else None


def _least_input(conv: nn.Module, kind: ConvKind, share: float) -> int:
    """From how many elements of its input on a convolution is not small.

    0 for one that does not know its channels yet.
    """
    weight_size = math.prod(kind.shape(conv))
    if weight_size == 0:
        return 0
    map_size = max(SMALL_MAP, share * weight_size)
    return math.ceil(map_size / kind.outputs_per_input(conv))


class KeptFold:
    """A fold that serves until what it was made from is changed.

    Args:
        made_from (tuple[Tensor | None]): Parameters and statistics.
        eps (float): Of the normalization.
        folded (tuple[Tensor, Tensor]): Weight and bias.
        dtype (torch.dtype): What the convolution runs in.
    """

    def __init__(self, made_from: tuple[Tensor | None, ...], eps: float,
                 folded: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self.made_from = made_from
        self.fingerprints = [fingerprint(t) for t in made_from]
        self.eps = eps
        self.folded = (folded[0].to(dtype), folded[1].to(dtype))

    def serves(self, made_from: tuple[Tensor | None, ...], eps: float,
               dtype: torch.dtype) -> bool:
        """Whether it still is the fold of these."""
        return (self.eps == eps and self.folded[0].dtype == dtype
                and all(new is old
                        for new, old in zip(made_from, self.made_from))
                # Tensors that count no versions could have changed unseen.
                and all(t is None or before[0] is not None
                        for t, before in zip(made_from, self.fingerprints))
                and self.fingerprints == [fingerprint(t) for t in made_from])


class NormState:
    """State of a :class:`HeldNorm` or :class:`FoldingNorm`.

    Attributes:
        hold (bool, optional): The ``training`` flag that is kept whatever is
            asked for, None to obey.
        asked (bool): The ``training`` flag that was asked for last.
        kind (NormKind, optional): When its statistics are fixed.
        deferrals (list[Deferral]): Of the convolutions before it.
        ran (str, optional): How the latest forward ran: 'fused', 'stock',
            or 'train mode' (stock, with the statistics of the batch).
        keeps_fold (bool): Whether a fold that no gradient needs may serve
            again.
        kept_fold (KeptFold, optional): That fold.
    """

    def __init__(self, asked: bool, hold: bool | None = None) -> None:
        self.asked = asked
        self.hold = hold
        self.kind: Any = None
        self.deferrals: list[Deferral] = []
        self.ran: str | None = None
        self.keeps_fold = False
        self.kept_fold: KeptFold | None = None
        self._fits_half = True
        self._half_folds = 0

    def keep_folds(self, keeps: bool) -> None:
        """Begin or cease to keep folds; either way none is left."""
        self.keeps_fold, self.kept_fold = keeps, None
        for deferral in self.deferrals:
            deferral.keeps_fold = keeps

    def fits_half(self, fold_from: tuple) -> bool:
        """Whether float16 can hold a folded weight and bias well.

        On other devices than the CPU, which would have to wait for the
        answer, it is asked now and then: hence the margin.

        Args:
            fold_from (tuple): Arguments of :func:`mmtune.functional.fold`.

        Returns:
            bool: What was found the last time; True in a compiled forward,
            which cannot ask.
        """
        if torch.compiler.is_compiling():
            return True
        # An activation checkpoint has to meet what its forward met.
        if _inside_backward():
            return self._fits_half
        on_cpu = fold_from[0].device.type == 'cpu'
        if on_cpu or self._half_folds % HALF_CHECK_INTERVAL == 0:
            with torch.no_grad():
                self._fits_half = _fits_half(*fold(*fold_from))
        self._half_folds += 1
        return self._fits_half


def _fits_half(weight: Tensor, bias: Tensor) -> bool:
    info = torch.finfo(torch.float16)
    low, high = info.tiny * HALF_MARGIN, info.max / HALF_MARGIN
    largest = float(weight.abs().amax())
    return (float(bias.abs().amax()) <= high
            # Zeros are what they are: gamma starts as zero in places.
            and (largest == 0 or low <= largest <= high))


class BlockScope(nn.Module):
    """Behaviour of the module whose forward calls Conv+BN pairs."""

    _tune_pairs: tuple[Pair, ...] = ()

    @staticmethod
    def wrap_forward(stock_forward: Callable) -> Callable:
        """Make a method with the stock signature."""

        @functools.wraps(stock_forward)
        def forward(self, *args, **kwargs):
            thread = _thread()
            outer = _RUNS.get(thread)
            if outer is not None and outer.block is self:
                return stock_forward(self, *args, **kwargs)
            run = _RUNS[thread] = BlockRun(self, outer)
            try:
                output = stock_forward(self, *args, **kwargs)
            finally:
                if outer is None:
                    del _RUNS[thread]
                else:
                    _RUNS[thread] = outer
            return run.finish(output) if run.promised else output

        return forward


class DeferringConv(nn.Module):
    """Behaviour of a convolution that is followed by a normalization."""

    _tune_deferral: Deferral | None = None

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Promise the output inside the block, compute it elsewhere."""
        if options or len(inputs) != 1 or type(inputs[0]) is not Tensor:
            if not inputs and len(options) == 1:
                inputs, options = tuple(options.values()), {}
            inputs, options = settle(inputs), settle(options)
        deferral = self._tune_deferral
        if (deferral is None or options or not inputs
                or deferral.is_small(inputs[0])):
            return super().forward(*inputs, **options)
        run = deferral.run_of_call(self)
        if run is not None:
            kind, name = deferral.kind, deferral.name
            if kind.gives_list:
                return [
                    run.promise(name, *branch)
                    for branch in kind.branches(self, *inputs)
                ]
            if isinstance(inputs[0], Tensor):
                return run.promise(name, kind, self, inputs)
        output = super().forward(*inputs)
        if inside_autograd_function() and isinstance(output, Tensor):
            output._tune_deferral = deferral
        return output

    def extra_repr(self) -> str:
        """Mark the convolution in ``print(model)``."""
        return _marked(super().extra_repr(), tune=self._tune_deferral)


class HeldNorm(nn.Module):
    """Behaviour of a normalization held in train or in eval mode."""

    _tune_state: NormState | None = None

    def train(self, mode: bool = True) -> 'HeldNorm':
        """Note what is asked for, and do what is held."""
        state = self._tune_state
        if state is not None:
            state.asked = mode
            state.kept_fold = None
            if state.hold is not None:
                mode = state.hold
        return super().train(mode)

    def extra_repr(self) -> str:
        """Mark the normalization in ``print(model)``."""
        state = self._tune_state
        return _marked(
            super().extra_repr(), norm_eval=state and state.hold is False,
            norm_train=state and state.hold)


class FoldingNorm(HeldNorm):
    """Behaviour of a normalization that runs itself and a promise as one."""

    def forward(self, input: Any) -> Tensor:
        """Run a promised convolution and itself as one where it can."""
        state = self._tune_state
        if type(input) is DeferredConv:
            if state is not None:
                output = self._fold(input, state)
                if output is not None:
                    state.ran = 'fused'
                    return output
            input = input.tensor()
        elif inside_autograd_function() and not input.requires_grad:
            # With a gradient it would come from outside of the function.
            deferral = getattr(input, '_tune_deferral', None)
            if deferral is not None:
                deferral.stays_inside = deferral.deferred = True
        if state is None:
            return super().forward(input)
        # Statistics change without a change of version.
        state.kept_fold = None
        output = state.kind.run_fixed(self, input)
        if output is None:
            fixed = state.kind.is_fixed(self)
            state.ran = 'stock' if fixed else 'train mode'
            return super().forward(input)
        state.ran = 'stock'
        return output

    def _fold(self, deferred: DeferredConv, state: NormState) -> Tensor | None:
        """Run both as one; None where the stock modules have to."""
        conv, kind = deferred.conv, deferred.kind
        weight, bias, mean, var = state.kind.tensors(self)
        coeff_shape = kind.coeff_shape(conv, deferred.weight.shape)
        if not _can_fold(self, deferred, mean, var, coeff_shape):
            return None
        eps = state.kind.eps(self)
        # What was given is padded, not what is convolved: autocast has some
        # paddings run in float32 whatever they get.
        linear_map: Any
        x, linear_map = kind.linear_map(conv, *deferred.inputs) or (
            deferred.inputs[0], None)
        x = x.to(_convolved_dtype(x, deferred.context[1]))
        learned = (deferred.weight, deferred.bias, weight, bias)
        made_from = (*learned, mean, var)
        keeps = (
            state.keeps_fold and linear_map is not None
            and not needs_gradient(x, *learned))
        if keeps and state.kept_fold is not None and state.kept_fold.serves(
                made_from, eps, x.dtype):
            return run_folded(linear_map, x, state.kept_fold.folded)

        rstd, bias_delta = norm_coefficients(mean, var, eps)
        put_buffers(conv, rstd.view(coeff_shape), bias_delta)
        fold_from: tuple = (*learned, rstd, bias_delta, coeff_shape)
        if x.dtype == torch.float16 and not state.fits_half(fold_from):
            return None
        if linear_map is None:
            folded = fold(*fold_from)
            return kind.run(conv, *folded, *deferred.inputs)
        if not keeps:
            return fold_and_run(linear_map, x, *fold_from)
        state.kept_fold = KeptFold(made_from, eps, fold(*fold_from),
                                   x.dtype)
        return run_folded(linear_map, x, state.kept_fold.folded)

    def extra_repr(self) -> str:
        """Mark the normalization in ``print(model)``."""
        return _marked(super().extra_repr(), tune=self._tune_state)


def _marked(text: str, **marks: Any) -> str:
    return text + ''.join(f', {name}=True' for name, on in marks.items() if on)


def _can_fold(norm: nn.Module, deferred: DeferredConv, mean: Tensor | None,
              var: Tensor | None, coeff_shape: tuple[int, ...]) -> bool:
    """Whether the stock pair takes this input, as one affine map."""
    kind = norm._tune_state.kind
    x, weight = deferred.inputs[0], deferred.weight
    if (mean is None or var is None or not kind.is_fixed(norm)
            or not deferred.foldable()
            or not kind.computes_formula(norm, x)):
        return False
    # Without a batch dimension the normalization would take the channels
    # for the batch.
    if x.dim() != weight.dim() or mean.numel() != math.prod(coeff_shape):
        return False
    output_dtype, *others = [
        _convolved_dtype(tensor, deferred.context[1])
        for tensor in (x, weight, deferred.bias) if tensor is not None
    ]
    if any(dtype != output_dtype for dtype in others):
        return False
    norm_dtype = var.dtype
    if norm_dtype != output_dtype and not (
            kind.takes_half and norm_dtype == torch.float32
            and output_dtype.itemsize == 2):
        return False
    kind.check_input(norm, x)
    return True


def _convolved_dtype(tensor: Tensor,
                     autocast_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a convolution takes a tensor.

    Autocast leaves float64 and what is no floating point number as they are.
    """
    if (autocast_dtype is None or tensor.dtype == torch.float64
            or not tensor.is_floating_point()):
        return tensor.dtype
    return autocast_dtype


def put_buffers(conv: nn.Module, weight_coeff: Tensor,
                bias_delta: Tensor) -> None:
    """Put what the fold was made with where users look for it.

    Args:
        conv (nn.Module): Gets or keeps the buffers ``BUFFERS``.
        weight_coeff (Tensor): ``rstd``, in the shape that multiplies the
            weight.
        bias_delta (Tensor): ``-mean``, shape (out_channels,).
    """
    if torch.compiler.is_exporting():
        # An exported program would go on to write them.
        return
    values = (weight_coeff, bias_delta)
    buffers = [conv._buffers.get(name) for name in BUFFERS]
    if all(buffer is not None and buffer.shape == value.shape
           and buffer.device == value.device
           for buffer, value in zip(buffers, values)):
        torch._foreach_copy_(buffers, values)
        return
    # What is made in inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        for name, value in zip(BUFFERS, values):
            conv.register_buffer(name, value.clone(), persistent=False)
