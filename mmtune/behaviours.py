"""What modules do differently: a block, its convolution, its normalization.

Each hangs on the instance (see :mod:`mmtune.attach`), so that the classes of
a model stay what they were:

- a block, the module whose forward calls the pair, notes while it runs that
  inside of it, and nowhere else, the pair's convolution may wait;
- the convolution returns a :class:`~mmtune.deferred.DeferredConv`, a promise
  that holds the module and its input;
- the normalization, given a promise while its statistics are fixed, runs the
  block as one convolution.

A pre-hook of the convolution or the normalization does the work, and the
forward on the instance lets the result through. Anything else that touches a
promise makes it run the plain convolution, so that the result is the stock
one whatever the control flow.
"""
import inspect
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy
from torch.overrides import _get_current_function_mode_stack

from mmtune.attach import (
    Hook,
    Override,
    attach,
    detach,
    heal,
    run_last,
)
from mmtune.deferred import (
    defer,
    fingerprint,
    inside_autograd_function,
    is_deferred,
    settle,
)
from mmtune.functional import (
    fold,
    fold_and_run,
    needs_gradient,
    norm_coefficients,
    run_folded,
)
from mmtune.kinds import ConvKind, NormKind, conv_kind, methods_of, patched

__all__ = [
    'BUFFERS', 'BlockState', 'ConvState', 'NormState', 'Pair', 'attach_block',
    'attach_conv', 'attach_norm', 'hold_norms', 'release'
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

# Who replaces these sees what every module gives.
CALL = nn.Module.__call__, nn.Module._call_impl

# By which a pre-hook hands its result to the forward on the instance.
PASSED = '_tune_passed'


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


def _at(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if module is not None:
            module = module._modules.get(name)
    return module


# --------------------------------------------------------------------------
# The block
# --------------------------------------------------------------------------


class Pair(NamedTuple):
    """A convolution and the normalization that follows it in one forward.

    Attributes:
        conv (ConvState): State of the convolution.
        norm (NormState): State of the normalization.
        conv_path (tuple[str]): Where the block has the convolution.
        norm_path (tuple[str]): Where the block has the normalization.
    """

    conv: 'ConvState'
    norm: 'NormState'
    conv_path: tuple[str, ...]
    norm_path: tuple[str, ...]


class BlockState:
    """State of a module whose forward calls pairs.

    Attributes:
        pairs (list[Pair]): What the trace found.
        told (bool): Whether a warning said that layers were replaced.
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.told = False

    def pairs_in(self, block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs that a block has now, by the modules that it has now."""
        found = []
        for pair in self.pairs:
            conv, norm = _at(block, pair.conv_path), _at(block, pair.norm_path)
            if (conv is not None and norm is not None
                    and '_tune_conv' in vars(conv)
                    and '_tune_norm' in vars(norm)):
                found.append((conv, norm))
            elif not self.told:
                self._tell(pair, conv, norm)
        return found

    def replaced(self, block: nn.Module) -> list[Pair]:
        """The pairs of which a block has another layer now."""
        return [
            pair for pair in self.pairs
            if any(
                _is_replaced(_at(block, path), state)
                for path, state in ((pair.conv_path, pair.conv),
                                    (pair.norm_path, pair.norm)))
        ]

    def _tell(self, pair: Pair, conv: Any, norm: Any) -> None:
        for layer, state in ((conv, pair.conv), (norm, pair.norm)):
            if _is_replaced(layer, state):
                self.told = True
                warnings.warn(
                    f'{state.name!r} was replaced after mmtune.turn_on by '
                    f'{type(layer).__name__}, so that its block runs as '
                    'stock; call turn_on again after the last replacement',
                    stacklevel=2)
                return


def _is_replaced(layer: Any, state: Any) -> bool:
    """Whether a layer is another than the one that was turned on."""
    # Turned off, it may be the same one still.
    return state.is_on and (layer is None or not (
        '_tune_conv' in vars(layer) or '_tune_norm' in vars(layer)))


# By thread, the innermost block that runs now.
_RUNS: dict[int, 'BlockRun'] = {}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _handled_error() -> BaseException | None:
    return None if torch.compiler.is_compiling() else sys.exc_info()[1]


class BlockRun:
    """One run of a block's forward, and the promises made in it.

    Args:
        block (nn.Module): The block.
        pairs (list[tuple[nn.Module, nn.Module]]): Its convolutions and
            normalizations.
        outer (BlockRun, optional): The run that this one is a part of.
    """

    __slots__ = ('block', 'error', 'inside_function', 'outer', 'pairs',
                 'promised', 'promises')

    def __init__(self, block: nn.Module, pairs: list,
                 outer: 'BlockRun | None') -> None:
        self.block = block
        self.pairs = pairs
        self.outer = outer
        self.error = _handled_error()
        self.inside_function = inside_autograd_function()
        self.promised = False
        self.promises: list[weakref.ref] = []

    def waits_for(self, conv: nn.Module, x: Any) -> bool:
        """Whether a convolution called in this run may wait for its norm."""
        for own, norm in self.pairs:
            if own is conv:
                state = norm._tune_norm
                state.why_stock = why_not_defer(conv, norm, x)
                if state.why_stock is None:
                    return True
        return False

    def promise(self, name: str, kind: ConvKind, conv: nn.Module,
                inputs: tuple) -> Any:
        """Promise the output of a convolution called in this run."""
        deferred = defer(name, conv, kind, inputs)
        self.promised = True
        if not torch.compiler.is_compiling():
            self.promises.append(weakref.ref(deferred))
        return deferred

    def finish(self, output: Any) -> Any:
        """Let no promise outlive the block, wherever it was put."""
        if not self.promised or _handled_error() is not self.error:
            return output
        output = settle(output)
        for reference in self.promises:
            deferred = reference()
            if deferred is not None:
                deferred.tensor()
        return output


def _enter(block: nn.Module) -> None:
    thread, state = _thread(), block._tune_block
    outer = _RUNS.get(thread)
    _RUNS[thread] = BlockRun(block, state.pairs_in(block), outer)


def _leave(block: nn.Module, output: Any) -> Any:
    thread = _thread()
    run = _RUNS.get(thread)
    # Runs inside of this one that ended without a word, as by Ctrl-C.
    while run is not None and run.block is not block:
        run = run.outer
    if run is None:
        return output
    if run.outer is None:
        del _RUNS[thread]
    else:
        _RUNS[thread] = run.outer
    return run.finish(output)


@Hook
def enter_block(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a block."""
    if '_tune_block' in vars(block):
        _enter(block)


@Hook
def leave_block(block: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a block."""
    return _leave(block, output)


class Entry(Override):
    """A method by which some run a block in the place of its forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.module
        run = _RUNS.get(_thread())
        if run is not None and run.block is block:
            return self.stock(*args, **kwargs)
        _enter(block)
        output = None
        try:
            output = self.stock(*args, **kwargs)
        finally:
            output = _leave(block, output)
        return output


class Replicate(Override):
    """Keeps the entries of a block from a replica, whose they are not."""

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        replica = self.stock(*args, **kwargs)
        for name, value in list(vars(replica).items()):
            if isinstance(value, (Entry, Replicate)):
                del vars(replica)[name]
        return replica


def attach_block(block: nn.Module, state: BlockState) -> None:
    """Make a module note its runs."""
    overrides: dict[str, type[Override]] = {
        name: Entry
        for name in entries_of(type(block)) if name not in vars(block)
    }
    if overrides:
        overrides['_replicate_for_data_parallel'] = Replicate
    attach(
        block, enter_block, leave_block, overrides=overrides,
        _tune_block=state)


def entries_of(block_type: type) -> list[str]:
    """Methods by which a module may be run beside its forward.

    Args:
        block_type (type): Class of the module.

    Returns:
        list[str]: Such as ``'rfp_forward'`` and ``'forward_single'``.
    """
    return [
        name for name in dir(block_type)
        if (name.startswith('forward_') or name.endswith('_forward'))
        and not name.startswith('_') and inspect.isfunction(
            inspect.getattr_static(block_type, name))
    ]


# --------------------------------------------------------------------------
# What the pre-hooks hand on
# --------------------------------------------------------------------------


class _Passed(NamedTuple):
    """What a pre-hook found, for the forward on the instance.

    Attributes:
        module (nn.Module): The module that really runs.
        args (tuple): What the output was made of.
        output (optional): Of the forward; None where the stock one runs.
    """

    module: nn.Module
    args: tuple
    output: Any

    def serves(self, args: tuple, kwargs: dict) -> bool:
        """Whether no hook changed the arguments since."""
        return (self.output is not None and not kwargs
                and len(args) == len(self.args)
                and all(new is old for new, old in zip(args, self.args)))


class Forward(Override):
    """Lets the result of the pre-hook through, or runs the stock forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        passed = kwargs.pop(PASSED, None)
        if passed is None:
            return self.stock(*settle(args), **settle(kwargs))
        if passed.serves(args, kwargs):
            return passed.output
        return self.run_stock(passed.module, args, kwargs)

    def run_stock(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Run the forward that the class has now."""
        return type(module).forward(module, *args, **kwargs)


def _positional(module: nn.Module, args: tuple,
                kwargs: dict) -> tuple[tuple, dict]:
    """Write arguments given by name in their places, where that is all."""
    if not kwargs:
        return args, kwargs
    if not args and len(kwargs) == 1:
        return tuple(kwargs.values()), {}
    code = getattr(type(module).forward, '__code__', None)
    if code is None:
        return args, kwargs
    names = code.co_varnames[1 + len(args):1 + len(args) + len(kwargs)]
    if set(names) != set(kwargs):
        return args, kwargs
    return (*args, *[kwargs[name] for name in names]), {}


def _own_code(layer: nn.Module, kind: ConvKind | NormKind) -> tuple | None:
    if patched(type(layer), kind):
        return None
    # What a lazy layer turns into in its first call.
    return kind.code(getattr(layer, 'cls_to_become', None) or type(layer))


# --------------------------------------------------------------------------
# The convolution
# --------------------------------------------------------------------------


class ConvState:
    """State of a convolution that is followed by a normalization.

    Attributes:
        name (str): Name of the convolution, for errors.
        kind (ConvKind): How the convolution runs.
        code (tuple, optional): The functions that it is known by; None
            where others were in their place when it was turned on.
        methods (frozenset[str]): What must not be replaced on the instance.
        norm (nn.Module): The normalization that folded it last.
        norm_kind (NormKind): Kind of that normalization.
        coeff_shape (tuple[int, ...], optional): In which a number for each
            output channel multiplies the weight; None where it is not known.
        is_on (bool): Whether it was not turned off.
        least_input (int): From how many elements of its input on the
            convolution is not small.
        least_kept (int): The same where the fold costs nothing.
        keeps_fold (bool): Whether the normalization keeps it.
        deferred (bool): Whether the latest call in a forward deferred, or
            could have.
        stays_inside (bool): Whether an autograd function that called the
            convolution was seen to call the normalization as well.
    """

    def __init__(self, name: str, conv: nn.Module, norm: nn.Module,
                 norm_kind: NormKind) -> None:
        kind: Any = conv_kind(type(conv))
        self.name = name
        self.kind: ConvKind = kind
        self.code = _own_code(conv, kind)
        self.methods = methods_of(type(conv))
        self.norm = norm
        self.norm_kind = norm_kind
        shape = kind.shape(conv)
        self.coeff_shape = None if 0 in shape else kind.coeff_shape(
            conv, shape)
        self.is_on = True
        self.least_input = _least_input(conv, kind, SMALL_SHARE)
        self.least_kept = _least_input(conv, kind, 0)
        self.keeps_fold = False
        self.deferred = False
        self.stays_inside = False

    def keep_folds(self, keeps: bool) -> None:
        """Note whether a fold may cost nothing."""
        self.keeps_fold = keeps

    def is_small(self, x: Any) -> bool:
        """Whether the stock modules are cheaper for the current call."""
        if torch.compiler.is_compiling():
            # A fold is a few kernels there.
            return False
        kept = self.keeps_fold and not torch.is_grad_enabled()
        least = self.least_kept if kept else self.least_input
        return isinstance(x, Tensor) and x.numel() < least

    def is_stock(self, conv: nn.Module) -> bool:
        """Whether the convolution runs the code that it is known by."""
        # A view goes through the shorter of the two.
        return (not vars(conv).keys() & self.methods
                and self.code == self.kind.code(type(conv)))

    def note_fold(self, norm: nn.Module, kind: NormKind,
                  coeff_shape: tuple[int, ...]) -> None:
        """Remember what the convolution was folded with."""
        self.norm, self.norm_kind = norm, kind
        self.coeff_shape = coeff_shape

    def run_of_call(self, conv: nn.Module, x: Any) -> BlockRun | None:
        """The run that the current call may make a promise in, if any."""
        run = _RUNS.get(_thread())
        while run is not None and not run.waits_for(conv, x):
            run = run.outer
        if run is None and _inside_backward():
            # An activation checkpoint runs a part of the block's forward
            # anew, and has to meet there what it met the first time.
            return BlockRun(conv, [], None) if self.deferred else None
        # A promise made inside an autograd function (a checkpoint is one)
        # could leave it, without its gradient.
        self.deferred = (
            run is not None and not _inside_transform()
            and (self.stays_inside
                 or run.inside_function == inside_autograd_function()))
        return run if self.deferred else None

    def promise(self, conv: nn.Module, inputs: tuple) -> Any:
        """Promise the output, or a list of them; None where it must run."""
        run = self.run_of_call(conv, inputs[0])
        if run is None:
            return None
        if self.kind.gives_list:
            return [
                run.promise(self.name, *branch)
                for branch in self.kind.branches(conv, *inputs)
            ]
        if not isinstance(inputs[0], Tensor):
            return None
        return run.promise(self.name, self.kind, conv, inputs)


def why_not_defer(conv: nn.Module, norm: nn.Module, x: Any) -> str | None:
    """Why a convolution has to run before its normalization is called.

    Args:
        conv (nn.Module): The convolution that is called.
        norm (nn.Module): The normalization that follows it in its block.
        x: First argument of the call.

    Returns:
        str | None: None where it may wait.
    """
    conv_state, norm_state = conv._tune_conv, norm._tune_norm
    if not norm_state.kind.is_fixed(norm):
        return 'train mode'
    if (conv._forward_hooks or conv._backward_hooks
            or conv._backward_pre_hooks
            # It could make the weight anew, as spectral_norm's does.
            or [*conv._forward_pre_hooks.values()][-1] is not call_conv
            or len(norm._forward_pre_hooks) != 1
            or norm._backward_hooks or norm._backward_pre_hooks
            or _has_any_global_hook()):
        return 'a hook sees what passes between the two'
    if (type(vars(norm).get('forward')) is not Forward
            or not conv_state.is_stock(conv)
            or not norm_state.is_stock(norm)):
        return 'a method of the two was replaced'
    return 'small' if conv_state.is_small(x) else None


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
              kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a convolution: promise its output, or not."""
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        args, kwargs = settle(args), settle(kwargs)
    if type(vars(conv).get('forward')) is not ConvForward:
        heal(conv, dict(forward=ConvForward))
        return args, kwargs
    args, kwargs = _positional(conv, args, kwargs)
    output = None
    state = vars(conv).get('_tune_conv')
    if state is not None and args and not kwargs:
        output = state.promise(conv, args)
        if output is None:
            run_last(conv, call_conv)
    return args, {**kwargs, PASSED: _Passed(conv, args, output)}


class ConvBuffers(dict):
    """The buffers of a convolution, which answer for two more by name.

    Those are no buffers of the model's: whatever pairs buffers by position or
    by key would stumble over them.

    Args:
        buffers (dict): What the convolution has.
        conv_state (ConvState): Knows the normalization.
    """

    def __init__(self, buffers: dict, conv_state: ConvState) -> None:
        super().__init__(buffers)
        self.conv_state = conv_state

    def __contains__(self, name: Any) -> bool:
        return super().__contains__(name) or (
            name in BUFFERS and self._constants() is not None)

    def __missing__(self, name: str) -> Tensor:
        constants = self._constants()
        if name not in BUFFERS or constants is None:
            raise KeyError(name)
        return constants[BUFFERS.index(name)]

    def _constants(self) -> tuple[Tensor, Tensor] | None:
        norm, shape = self.conv_state.norm, self.conv_state.coeff_shape
        _, _, mean, var = self.conv_state.norm_kind.tensors(norm)
        if mean is None or var is None or is_lazy(mean) or shape is None:
            return None
        with torch.no_grad():
            rstd, bias_delta = norm_coefficients(
                mean, var, self.conv_state.norm_kind.eps(norm))
            return rstd.view(shape).to(var.dtype), bias_delta.to(mean.dtype)


class NamedBuffers(Override):
    """Lists the two constants of the fold among a convolution's buffers."""

    def __call__(self, prefix: str = '', recurse: bool = True,
                 remove_duplicate: bool = True) -> Iterator:
        """See ``nn.Module.named_buffers``."""
        yield from self.stock(prefix, recurse, remove_duplicate)
        for name in BUFFERS:
            if name in self.module._buffers:
                yield f'{prefix}.{name}'.lstrip('.'), getattr(
                    self.module, name)


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


def release(module: nn.Module) -> None:
    """Make a module stock again, whatever it was given.

    A normalization that was held follows what was asked for last.

    Args:
        module (nn.Module): Any module; its children are left alone.
    """
    own = vars(module)
    for key in ('_tune_conv', '_tune_norm', '_tune_held'):
        if key in own:
            own[key].is_on = False
    if isinstance(own['_buffers'], ConvBuffers):
        own['_buffers'] = dict(own['_buffers'])
    held = own.get('_tune_held')
    detach(module)
    if held is not None:
        module.train(held.asked)


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


class NormState:
    """State of a normalization that folds.

    Attributes:
        name (str): Name of the normalization, for messages.
        kind (NormKind): When its statistics are fixed.
        code (tuple, optional): See :class:`ConvState`.
        methods (frozenset[str]): What must not be replaced on the instance.
        is_on (bool): Whether it was not turned off.
        ran (str, optional): How the latest forward ran: 'fused', 'stock',
            or 'train mode' (stock, with the statistics of the batch).
        why_stock (str, optional): Why the convolution did not wait.
        keeps_fold (bool): Whether a fold that no gradient needs may serve
            again.
        kept_fold (KeptFold, optional): That fold.
    """

    def __init__(self, name: str, norm: nn.Module, kind: NormKind) -> None:
        self.name = name
        self.kind = kind
        self.code = _own_code(norm, kind)
        self.methods = methods_of(type(norm))
        self.is_on = True
        self.ran: str | None = None
        self.why_stock: str | None = None
        self.keeps_fold = False
        self.kept_fold: KeptFold | None = None
        self._fits_half = True
        self._half_folds = 0

    def is_stock(self, norm: nn.Module) -> bool:
        """Whether the normalization runs the code that it is known by."""
        return (not vars(norm).keys() & self.methods
                and self.code == self.kind.code(type(norm)))

    def latest_run(self) -> str:
        """How the latest forward ran, see :func:`mmtune.api.latest_runs`."""
        if self.ran == 'stock' and self.why_stock == 'small':
            return 'small'
        return self.ran or 'not run'

    def keep_folds(self, keeps: bool) -> None:
        """Begin or cease to keep folds; either way none is left."""
        self.keeps_fold, self.kept_fold = keeps, None

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
        weight, bias, mean, var = self.kind.tensors(norm)
        coeff_shape = kind.coeff_shape(conv, deferred.weight.shape)
        if not _can_fold(norm, deferred, mean, var, coeff_shape):
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
        x = x.to(_convolved_dtype(x, deferred.context[1]))
        learned = (deferred.weight, deferred.bias, weight, bias)
        made_from = (*learned, mean, var)
        keeps = (
            self.keeps_fold and linear_map is not None
            and not needs_gradient(x, *learned))
        if keeps and self.kept_fold is not None and self.kept_fold.serves(
                made_from, eps, x.dtype):
            return run_folded(linear_map, x, self.kept_fold.folded)

        rstd, bias_delta = norm_coefficients(mean, var, eps)
        fold_from: tuple = (*learned, rstd, bias_delta, coeff_shape)
        if x.dtype == torch.float16 and not self.fits_half(fold_from):
            return None
        if linear_map is None:
            folded = fold(*fold_from)
            return kind.run(conv, *folded, *deferred.inputs)
        if not keeps:
            return fold_and_run(linear_map, x, *fold_from)
        self.kept_fold = KeptFold(made_from, eps, fold(*fold_from),
                                  x.dtype)
        return run_folded(linear_map, x, self.kept_fold.folded)


def _fits_half(weight: Tensor, bias: Tensor) -> bool:
    info = torch.finfo(torch.float16)
    low, high = info.tiny * HALF_MARGIN, info.max / HALF_MARGIN
    largest = float(weight.abs().amax())
    return (float(bias.abs().amax()) <= high
            # Zeros are what they are: gamma starts as zero in places.
            and (largest == 0 or low <= largest <= high))


def _can_fold(norm: nn.Module, deferred: Any, mean: Tensor | None,
              var: Tensor | None, coeff_shape: tuple[int, ...]) -> bool:
    """Whether the stock pair takes this input, as one affine map."""
    kind = norm._tune_norm.kind
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


@Hook
def call_norm(norm: nn.Module, args: tuple,
              kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a normalization: fold what it is given, or not."""
    state = vars(norm).get('_tune_norm')
    if state is None:
        return settle(args), settle(kwargs)
    if type(vars(norm).get('forward')) is not Forward:
        heal(norm, dict(forward=Forward))
        args, kwargs = settle(args), settle(kwargs)
        _note_stock(norm, state, args)
        return args, kwargs
    args, kwargs = _positional(norm, args, kwargs)
    output = None
    if len(args) == 1 and is_deferred(args[0]) and not kwargs:
        if state.is_stock(norm):
            output = state.fold(norm, args[0])
    if output is not None:
        state.ran = 'fused'
    else:
        args, kwargs = settle(args), settle(kwargs)
        _note_stock(norm, state, args)
    return args, {**kwargs, PASSED: _Passed(norm, args, output)}


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


# --------------------------------------------------------------------------
# Held normalizations
# --------------------------------------------------------------------------


class Held:
    """State of a normalization that is held in train or in eval mode.

    Attributes:
        training (bool): The ``training`` flag that is kept.
        asked (bool): The flag that was asked for last.
        is_on (bool): Whether it was not turned off.
    """

    def __init__(self, norm: nn.Module, training: bool) -> None:
        self.training = training
        self.is_on = True
        self.asked = norm.training


class HeldPaths:
    """State of a root whose normalizations are held.

    Attributes:
        held (dict[tuple[str, ...], Held]): By where the root has them.
    """

    def __init__(self, held: dict[tuple[str, ...], Held]) -> None:
        self.held = held

    def follow(self, root: nn.Module) -> None:
        """Hold what took the place of a normalization, and say so."""
        followed = []
        for path, held in list(self.held.items()):
            norm = _at(root, path)
            if norm is not None and vars(norm).get('_tune_held') is held:
                continue
            del self.held[path]
            # Else somebody turned it off, or took it away.
            if held.is_on and norm is not None and 'running_mean' in vars(
                    norm)['_buffers']:
                self.held[path] = hold_norm(norm, held.training)
                followed.append('.'.join(path))
        if followed:
            mode = 'train' if held.training else 'eval'
            warnings.warn(
                f'{len(followed)} normalizations were replaced after '
                f'mmtune.turn_on ({followed[0]!r} is the first) and are held '
                f'in {mode} mode from now on; call turn_on again after the '
                'last replacement',
                stacklevel=2)


@Hook
def follow_held(root: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a root whose normalizations are held."""
    state = vars(root).get('_tune_held_paths')
    if state is not None and not torch.compiler.is_compiling():
        state.follow(root)


def hold_norms(root: nn.Module, norms: list[nn.Module],
               training: bool) -> None:
    """Hold normalizations, and those that take their places later.

    Args:
        root (nn.Module): Holds the normalizations.
        norms (list[nn.Module]): Each at or below ``root``.
        training (bool): The ``training`` flag to keep.
    """
    states = {norm: hold_norm(norm, training) for norm in norms}
    paths = {
        tuple(name.split('.')) if name else (): states[module]
        for name, module in root.named_modules(remove_duplicate=False)
        if module in states
    }
    attach(root, follow_held, _tune_held_paths=HeldPaths(paths))


class HeldTrain(Override):
    """``train()`` that notes what is asked for and does what is held."""

    def __call__(self, mode: bool = True) -> nn.Module:
        """See ``nn.Module.train``."""
        held = self.module._tune_held
        held.asked = mode
        return self.stock(held.training)


def hold_norm(norm: nn.Module, training: bool) -> Held:
    """Hold a normalization in train or in eval mode.

    Args:
        norm (nn.Module): Stays there, whatever ``train()`` asks for.
        training (bool): The ``training`` flag to keep.

    Returns:
        Held: Its state; the one that it has, where another root holds it.
    """
    held = vars(norm).get('_tune_held')
    if held is not None:
        return held
    held = Held(norm, training)
    attach(
        norm,
        overrides=dict(train=HeldTrain, extra_repr=TunedRepr),
        _tune_held=held)
    norm.train(held.asked)
    return held


class TunedRepr(Override):
    """Marks a module in ``print(model)``."""

    def __call__(self) -> str:
        """See ``nn.Module.extra_repr``."""
        own = vars(self.module)
        text = self.stock()
        if '_tune_conv' in own or '_tune_norm' in own:
            text += ', tune=True'
        if '_tune_held' in own:
            held = 'norm_train' if own['_tune_held'].training else 'norm_eval'
            text += f', {held}=True'
        return text.removeprefix(', ')
