"""What a convolution and the normalization after it do differently.

Both hang on the instance (see :mod:`mmtune.attach`), so that the classes of a
model stay what they were:

- the convolution, where a run of its block allows it to wait, returns a
  :class:`~mmtune.deferred.DeferredConv`, a promise that holds the module and
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

from mmtune.attach import (
    Hook,
    Override,
    TunedRepr,
    attach,
    has_hooks,
    heal,
    run_last,
)
from mmtune.buffers import ConvBuffers, NamedBuffers
from mmtune.calls import is_own_batch_norm
from mmtune.deferred import (
    fingerprint,
    inside_autograd_function,
    is_deferred,
    settle,
)
from mmtune.functional import (
    Plan,
    fold,
    fold_and_run_norm,
    native_node,
    needs_gradient,
    norm_coefficients,
    run_folded,
)
from mmtune.kinds import ConvKind, NormKind, conv_kind, methods_of, patched
from mmtune.runs import BlockRun, runs, thread

__all__ = ['ConvState', 'NormState', 'attach_conv', 'attach_norm']

# Without the native node a fold costs some twenty short operations and ten
# passes over the weight; it spares backward one feature map and the
# normalization's passes over it. Where the map has fewer elements than this,
# or than this share of the weight, the stock modules take less time.
SMALL_MAP = 65536
SMALL_SHARE = 1 / 8

# How much a folded weight may change before it leaves float16's range, where
# numbers overflow or lose their digits, and how many folds may pass before it
# is looked at again.
HALF_MARGIN = 16
HALF_CHECK_INTERVAL = 64

# Who replaces these sees what every module gives.
CALL = nn.Module.__call__, nn.Module._call_impl

# By thread, what a pre-hook hands to the forward on the instance that runs
# next: that forward, the module, its arguments, and the output, None where the
# stock forward is to run.
_PASSED: dict[int, tuple] = {}


class Forward(Override):
    """Lets the result of the pre-hook through, or runs the stock forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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
        keeps_fold (bool): Whether a fold that no gradient needs may serve
            again.
    """

    def __init__(self, name: str, layer: nn.Module, kind: Any) -> None:
        self.name = name
        self.kind = kind
        # What a lazy layer turns into in its first call.
        final = getattr(layer, 'cls_to_become', None) or type(layer)
        self.code = None if patched(type(layer), kind) else kind.code(final)
        self.methods = methods_of(type(layer))
        self.is_on = True
        self.keeps_fold = False

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
        least_kept (int): The same where the fold costs nothing.
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
        self.least_input = _least_input(conv, kind, SMALL_SHARE)
        self.least_kept = _least_input(conv, kind, 0)
        self.deferred = False
        self.stays_inside = False

    def keep_folds(self, keeps: bool) -> None:
        """Note whether a fold may cost nothing."""
        self.keeps_fold = keeps

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
        kept = self.keeps_fold and not torch.is_grad_enabled()
        least = self.least_kept if kept else self.least_input
        return (isinstance(x, Tensor) and x.numel() < least
                and native_node(x, x) is None)

    def promise(self, conv: nn.Module, inputs: tuple) -> Any:
        """Promise the output, or a list of them; None where it must run."""
        x = inputs[0]
        run = self._run_of_call(conv, x)
        if run is None:
            return None
        if self.kind.gives_list:
            return [
                run.promise(self.name, *branch)
                for branch in self.kind.branches(conv, *inputs)
            ]
        if not isinstance(x, Tensor):
            return None
        # A lazy layer that was loaded goes on to have none.
        channels = conv.__dict__.get('in_channels')
        if channels and x.dim() > 1 and x.size(1) != channels:
            # Stock's error comes from the convolution, not later.
            return None
        return run.promise(self.name, self.kind, conv, inputs)

    def _run_of_call(self, conv: nn.Module, x: Any) -> BlockRun | None:
        """The run that the current call may make a promise in, if any."""
        run = runs()
        while run is not None and not _waits(run, conv, self, x):
            run = run.outer
        if run is None and _inside_backward():
            # An activation checkpoint runs a part of the block's forward
            # anew, and has to meet there what it met the first time.
            if not self.deferred or why_not_defer(conv, self, self.norm, x):
                return None
            run = BlockRun(conv, [], None)
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
        if own is conv:
            norm_state = norm._tune_norm
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
    if type(x) is not Tensor and _follows(x):
        return 'a tensor of its own type follows what is done to it'
    return 'small' if state.is_small(x) else None


def _follows(tensor: Any) -> bool:
    """Whether a tensor's own type sees what functions do with it."""
    kind = type(tensor)
    return kind is not Tensor and isinstance(tensor, Tensor) and (
        kind.__torch_function__ is not torch._C._disabled_torch_function_impl)


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
            or torch._C._get_tracing_state() is not None
            or (nn.Module.__call__, nn.Module._call_impl) != CALL
            or torch._C._len_torch_function_stack() > 0
            and not all(type(mode).__module__.startswith('torch.')
                        for mode in _get_current_function_mode_stack()))


def _least_input(conv: nn.Module, kind: ConvKind, share: float) -> int:
    """From how many elements of its input on a convolution is not small.

    0 for one that does not know its channels yet.
    """
    weight_size = math.prod(kind.shape(conv))
    if weight_size == 0:
        return 0
    map_size = max(SMALL_MAP, share * weight_size)
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
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        args, kwargs = settle(args), settle(kwargs)
        if kwargs:
            args, kwargs = _positional(conv, args, kwargs)
    if type(own.get('forward')) is not ConvForward:
        heal(conv, 'forward', ConvForward)
        return args, kwargs
    output = None
    state = own.get('_tune_conv')
    if state is not None and args and not kwargs:
        output = state.promise(conv, args)
        if output is None:
            run_last(conv, call_conv)
    _PASSED[thread()] = own['forward'], conv, args, output
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


class NormState(_LayerState):
    """State of a normalization that folds.

    Attributes:
        ran (str, optional): How the latest forward ran: 'fused', 'stock',
            or 'train mode' (stock, with the statistics of the batch).
        why_stock (str, optional): Why the convolution did not wait.
        kept_fold (KeptFold, optional): That fold.
    """

    kind: NormKind

    def __init__(self, name: str, norm: nn.Module, kind: NormKind) -> None:
        super().__init__(name, norm, kind)
        self.ran: str | None = None
        self.why_stock: str | None = None
        self.kept_fold: KeptFold | None = None
        self._fits_half = True
        self._half_folds = 0

    def latest_run(self) -> str:
        """How the latest forward ran, see :func:`mmtune.api.latest_runs`."""
        if self.ran == 'stock' and self.why_stock == 'small':
            return 'small'
        return self.ran or 'not run'

    def keep_folds(self, keeps: bool) -> None:
        """Begin or cease to keep folds; either way none is left."""
        self.keeps_fold, self.kept_fold = keeps, None

    def fits_half(self, learned: tuple[Any, Any, Any, Any], mean: Tensor,
                  var: Tensor, eps: float,
                  coeff_shape: tuple[int, ...]) -> bool:
        """Whether float16 can hold a folded weight and bias well.

        On other devices than the CPU, which would have to wait for the
        answer, it is asked now and then: hence the margin.

        Args:
            learned (tuple): Weight and bias of the convolution and of the
                normalization.
            mean (Tensor): Shape (out_channels,).
            var (Tensor): Shape (out_channels,).
            eps (float): Added to the variance.
            coeff_shape (tuple[int, ...]): See :mod:`mmtune.functional`.

        Returns:
            bool: What was found the last time; True in a compiled forward,
            which cannot ask.
        """
        if torch.compiler.is_compiling():
            return True
        # An activation checkpoint has to meet what its forward met.
        if _inside_backward():
            return self._fits_half
        on_cpu = mean.device.type == 'cpu'
        if on_cpu or self._half_folds % HALF_CHECK_INTERVAL == 0:
            with torch.no_grad():
                coefficients = norm_coefficients(mean, var, eps)
                folded = fold(*learned, *coefficients, coeff_shape)
                self._fits_half = _fits_half(*folded)
        self._half_folds += 1
        return self._fits_half

    def fold(self, norm: nn.Module, deferred: Any) -> Tensor | None:
        """Run a promised convolution and the normalization as one.

        Args:
            norm (nn.Module): The normalization.
            deferred (DeferredConv): What it was given.

        Returns:
            Tensor | None: Shape (batch, out_channels, ...); None where the
            stock modules have to run.
        """
        conv, kind = deferred.conv, deferred.kind
        own = weight, bias, mean, var = self.kind.tensors(norm)
        coeff_shape = kind.coeff_shape(conv, deferred.weight.shape)
        if not _can_fold(norm, deferred, own, coeff_shape):
            return None
        conv_state = vars(conv).get('_tune_conv')
        if conv_state is not None:
            conv_state.note_fold(norm, self.kind, coeff_shape)
        eps = self.kind.eps(norm)
        # What was given is padded, not what is convolved: autocast has some
        # paddings run in float32 whatever they get.
        linear_map: Any
        x, linear_map = kind.linear_map(conv, *deferred.inputs) or (
            deferred.inputs[0], None)
        if deferred.context[1] is not None:
            x = x.to(_convolved_dtype(x, deferred.context[1]))
        learned = (deferred.weight, deferred.bias, weight, bias)
        made_from = (*learned, mean, var)
        keeps = (
            self.keeps_fold and linear_map is not None
            and not torch.compiler.is_compiling()
            and not needs_gradient(x, *learned))
        if keeps and self.kept_fold is not None and self.kept_fold.serves(
                made_from, eps, x.dtype):
            return run_folded(linear_map, x, self.kept_fold.folded)

        plan = Plan.CHOOSE
        if x.dtype == torch.float16 and not self.fits_half(
                learned, mean, var, eps, coeff_shape):
            # Scaling the map computes in the range that Eval computes in.
            plan = Plan.SCALE
            if linear_map is None or native_node(x, deferred.weight) is None:
                return None
        if linear_map is None and kind.needs_map:
            return None
        if linear_map is None or keeps:
            folded = fold(*learned, *norm_coefficients(mean, var, eps),
                          coeff_shape)
            if linear_map is None:
                return kind.run(conv, *folded, *deferred.inputs)
            self.kept_fold = KeptFold(made_from, eps, folded, x.dtype)
            return run_folded(linear_map, x, self.kept_fold.folded)
        return fold_and_run_norm(linear_map, x, *learned, mean, var, eps,
                                 coeff_shape, plan)


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
        output = None
        if is_own_batch_norm(norm, *args, **kwargs):
            output = self.fold(norm, promise)
        if output is None:
            # Statistics change without a change of version.
            self.kept_fold = None
        else:
            self.ran, promise.folded = 'fused', output.requires_grad
        return output


def _fits_half(weight: Tensor, bias: Tensor) -> bool:
    info = torch.finfo(torch.float16)
    low, high = info.tiny * HALF_MARGIN, info.max / HALF_MARGIN
    largest = float(weight.abs().amax())
    return (float(bias.abs().amax()) <= high
            # Zeros are what they are: gamma starts as zero in places.
            and (largest == 0 or low <= largest <= high))


def _can_fold(norm: nn.Module, deferred: Any, own: tuple[Tensor | None, ...],
              coeff_shape: tuple[int, ...]) -> bool:
    """Whether the stock pair takes this input, as one affine map."""
    kind = norm._tune_norm.kind
    *_, mean, var = own
    x, weight = deferred.inputs[0], deferred.weight
    if (mean is None or var is None or not kind.is_fixed(norm)
            or not deferred.foldable()
            or _follows(weight) or _follows(deferred.bias)
            or not kind.computes_formula(norm, x)):
        return False
    # Without a batch dimension the normalization would take the channels
    # for the batch.
    if x.dim() != weight.dim() or mean.numel() != torch.Size(
            coeff_shape).numel():
        return False
    bias, autocast_dtype = deferred.bias, deferred.context[1]
    output_dtype = _convolved_dtype(x, autocast_dtype)
    if (_convolved_dtype(weight, autocast_dtype) != output_dtype
            or bias is not None
            and _convolved_dtype(bias, autocast_dtype) != output_dtype):
        return False
    norm_dtype = var.dtype
    if any(t is not None and t.dtype != norm_dtype for t in own):
        return False
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


@Hook
def call_norm(norm: nn.Module, args: tuple,
              kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a normalization: fold what it is given, or not."""
    if kwargs is None:
        return None
    state = vars(norm).get('_tune_norm')
    if state is None:
        return settle(args), settle(kwargs)
    if type(vars(norm).get('forward')) is not Forward:
        heal(norm, 'forward', Forward)
        args, kwargs = settle(args), settle(kwargs)
        _note_stock(norm, state, args)
        return args, kwargs
    if kwargs:
        args, kwargs = _positional(norm, args, kwargs)
    output = None
    if len(args) == 1 and is_deferred(args[0]) and not kwargs:
        if state.is_stock(norm) and not _is_opaque(state):
            if state.kind.runs_forward:
                state.ran = 'stock'
                args[0].receiver = functools.partial(state.receive, norm)
                _PASSED[thread()] = vars(norm)['forward'], norm, args, None
                return args, kwargs
            output = state.fold(norm, args[0])
    if output is not None:
        state.ran = 'fused'
        args[0].folded = output.requires_grad
        output = state.kind.finish(norm, output)
    else:
        args, kwargs = settle(args), settle(kwargs)
        _note_stock(norm, state, args)
    _PASSED[thread()] = vars(norm)['forward'], norm, args, output
    return args, kwargs


def _is_opaque(state: NormState) -> bool:
    """Whether calls in the forward of a normalization cannot be seen."""
    return state.kind.runs_forward and torch.compiler.is_compiling()


def _note_stock(norm: nn.Module, state: NormState, args: tuple) -> None:
    state.ran = 'stock' if state.kind.is_fixed(norm) else 'train mode'
    # Statistics change without a change of version.
    state.kept_fold = None
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
