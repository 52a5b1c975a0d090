"""Find Conv -> BN pairs, and say why a normalization is in none.

Each module that calls convolutions or normalizations itself is traced with
torch.fx, its children as leaves; a whole detector never is. A trace need not
be the only way through the forward, because a pair is only a candidate: what
really runs is decided at each call (see :mod:`mmtune.behaviours`).
"""
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from mmtune.layers.calls import forget_trials
from mmtune.layers.code import methods_of, patched
from mmtune.layers.convolutions import (
    conv_kind,
    is_known_conv,
    looks_like_conv,
)
from mmtune.layers.frozen import forget_probes
from mmtune.layers.normalizations import (
    looks_like_norm,
    norm_kind,
    why_not_folded,
)
from mmtune.matching.borders import Ends
from mmtune.matching.tracing import OWN_OPTION, has_forward
from mmtune.utils.attach import overridden

__all__ = [
    'OWN_OPTION', 'LeftOut', 'Match', 'Matches', 'find_pairs', 'norms_of'
]


class Match(NamedTuple):
    """A pair, by the names that ``model.named_modules()`` gives.

    Attributes:
        block (str): The module whose forward calls the two.
        conv (str): The convolution.
        norm (str): The normalization.
        conv_path (str): What the block calls the convolution.
        norm_path (str): What the block calls the normalization.
        stock (str): Why the two run as stock as long as their code is what
            it is now, else empty.
        sole (bool): Whether both are called once in all forwards traced,
            and no trace had to guess a branch: the pair may then be folded
            for good.
        via (tuple[str, ...]): What the block calls the modules that are given
            what passes between the two, or give it.
    """

    block: str
    conv: str
    norm: str
    conv_path: str
    norm_path: str
    stock: str
    sole: bool
    via: tuple[str, ...] = ()


class LeftOut(NamedTuple):
    """A normalization that is in no pair.

    Attributes:
        norm (str): Its name.
        conv (str, optional): The convolution before it, where there is one.
        reason (str): Why the two are no pair.
        held (bool): Whether modes hold it in train or in eval mode.
    """

    norm: str
    conv: str | None
    reason: str
    held: bool = True


class Matches(NamedTuple):
    """What :func:`find_pairs` found."""

    pairs: list[Match]
    left_out: list[LeftOut]


def norms_of(module: nn.Module) -> list[nn.Module]:
    """The normalizations by kept statistics in a module, each once."""
    return [m for m in module.modules() if _is_norm(m)]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or norm_kind(
        module) is not None


def _is_held(norm: nn.Module) -> bool:
    """Whether train and eval mode differ for a normalization."""
    return isinstance(norm, _BatchNorm) or (
        _is_norm(norm) and why_not_folded(norm) is None)


def find_pairs(model: nn.Module, roots: Sequence[nn.Module]) -> Matches:
    """Find the Conv -> BN pairs below some modules. Changes nothing.

    Args:
        model (nn.Module): Gives the names.
        roots (Sequence[nn.Module]): Modules of ``model`` to search.

    Returns:
        Matches: Pairs in the order of the traces, and every other
        normalization below ``roots`` with its reason.
    """
    forget_probes()
    forget_trials()
    search = _Search(model, roots)
    modules = {m: None for root in roots for m in root.modules()}
    for block in modules:
        if has_forward(block) and (
                any(map(_is_layer, _own_modules(block)))
                or _reaches_in(block) or search.ends.may_meet(block)):
            search.read(block)
    return search.result()


class _Search:
    """Gathers what the traces of all blocks show.

    Args:
        model (nn.Module): Gives the names.
        roots (Sequence[nn.Module]): Modules whose normalizations are asked
            for.
    """

    def __init__(self, model: nn.Module, roots: Sequence[nn.Module]) -> None:
        self.names = {m: name for name, m in model.named_modules()}
        # Dicts for their order.
        self.norms = {
            m: None
            for root in roots for m in root.modules()
            if _is_norm(m) or looks_like_norm(m)
        }
        self.ends = Ends()
        # By block, convolution and norm.
        self.pairs: dict[tuple[nn.Module, nn.Module, nn.Module], _Found] = {}
        self.reasons: dict[nn.Module, tuple[nn.Module | None, str]] = {}
        # By block, how often its forward calls each module.
        self.calls: dict[nn.Module, Counter[nn.Module]] = {}
        # What some forward reaches into, without calling it.
        self.entered: set[nn.Module] = set()

    def read(self, block: nn.Module) -> None:
        """Trace a block and note the pairs, or why there are none."""
        graphs, exact, error = self.ends.traces(block)
        counts = self.calls[block] = Counter()
        for graph in graphs:
            sites = [node for node in graph.nodes if node.op == 'call_module']
            # On different ways through the forward, not one after the other.
            counts |= Counter(map(block.get_submodule,
                                  (node.target for node in sites)))
            for node in sites:
                self._note_entered(block, node.target)
                self._read_call(block, node, exact)
        self.calls[block] = counts
        if error is not None:
            reason = (f'the forward of {self._name(block)} cannot be traced '
                      f'({error})')
            for module in _own_modules(block):
                self.reasons.setdefault(module, (None, reason))

    def _name(self, block: nn.Module) -> str:
        return repr(self.names[block]) if self.names[block] else 'the model'

    def _note_entered(self, block: nn.Module, target: str) -> None:
        *path, _ = target.split('.')
        for name in path:
            block = getattr(block, name)
            self.entered.add(block)

    def _read_call(self, block: nn.Module, node: fx.Node,
                   exact: bool) -> None:
        """Read a call of a normalization, or of what begins with one."""
        begin = self.ends.begin(block.get_submodule(node.target))
        if begin is None:
            return
        norm_path = '.'.join(filter(None, (node.target, begin.path)))
        norm = block.get_submodule(norm_path)
        if norm not in self.norms:
            return
        source = self.ends.source(block, node, first=bool(begin.path))
        conv = None
        if source.path is not None:
            conv = block.get_submodule(source.path)
        reason = (conv is not None and _unfit_pair(conv, norm)
                  ) or source.reason
        if source.path is not None and conv is not None and not reason:
            via = [*source.via, *('.'.join(filter(None, (node.target, path)))
                                  for path in begin.via)]
            self.pairs.setdefault(
                (block, conv, norm),
                _Found(source.path, norm_path, tuple(via), exact))
        elif reason and (not begin.path or conv is not None):
            self.reasons[norm] = (conv, reason)

    def result(self) -> Matches:
        """The pairs found, and the normalizations that are in none."""
        called = {m for counts in self.calls.values() for m in counts}
        # Nobody calls these: others call what is in them.
        unused = self.entered - called
        calls = sum((counts for block, counts in self.calls.items()
                     if block not in unused), Counter())
        pairs = []
        for (block, conv, norm), found in self.pairs.items():
            if block in unused and any(
                    own[1:] == (conv, norm) and own[0] not in unused
                    for own in self.pairs):
                continue
            sole = (found.exact and not found.via
                    and calls[conv] == calls[norm] == 1)
            pairs.append(
                Match(self.names[block], self.names[conv], self.names[norm],
                      found.conv_path, found.norm_path,
                      _why_stock(conv) or _why_stock(norm), sole, found.via))
        paired = {norm for *_, norm in self.pairs}
        left_out = []
        for norm in self.norms:
            if norm in paired:
                continue
            conv, reason = self.reasons.get(
                norm, (None, 'no traced forward calls it'))
            never = why_not_folded(norm)
            left_out.append(
                LeftOut(self.names[norm], None if conv is None else
                        self.names[conv], never or reason, _is_held(norm)))
        return Matches(pairs, left_out)


class _Found(NamedTuple):
    """What a block calls the layers of a pair, and whether on one way."""

    conv_path: str
    norm_path: str
    via: tuple[str, ...]
    exact: bool


def _is_layer(module: nn.Module) -> bool:
    return looks_like_conv(module) or _is_norm(module)


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Children, and those in containers, which a forward may reach into."""
    for child in module.children():
        if not has_forward(child):
            yield from _own_modules(child)
            continue
        yield child
        if type(child) is nn.Sequential:
            yield from _own_modules(child)


def _reaches_in(module: nn.Module) -> bool:
    """Whether a forward names a layer of a child's, which it may call."""
    # That of a scripted class cannot be asked for.
    forward = inspect.getattr_static(type(module), 'forward')
    code = getattr(forward, '__code__', None)
    names = () if code is None else code.co_names
    return any(
        name.rpartition('.')[2] in names and _is_layer(layer)
        for name, layer in module.named_modules())


# --------------------------------------------------------------------------
# Why two layers are no pair
# --------------------------------------------------------------------------


def _unfit_pair(conv: nn.Module, norm: nn.Module) -> str | None:
    return _unfit_conv(conv) or _unfit_norm(norm) or _unfit(conv, norm)


def _unfit_conv(conv: nn.Module) -> str | None:
    if overridden(conv, 'forward'):
        return "the convolution's forward is replaced on the instance"
    if not is_known_conv(conv):
        return (f'{type(conv).__name__} is not a convolution that '
                'mmtune knows')
    return None


def _why_stock(layer: nn.Module) -> str:
    """Whose code stands in the place of a layer's own, for now."""
    for name in sorted(methods_of(type(layer))):
        if overridden(layer, name):
            return (f'`{name}` of the {type(layer).__name__} is replaced on '
                    'the instance')
    kind = conv_kind(type(layer)) or norm_kind(layer)
    assert kind is not None, 'a pair has known layers'
    function = patched(type(layer), kind)
    return '' if function is None else f'`{function}` is replaced'


def _unfit_norm(norm: nn.Module) -> str | None:
    if overridden(norm, 'forward'):
        return "the BN's forward is replaced on the instance"
    return why_not_folded(norm)


def _unfit(conv: nn.Module, norm: nn.Module) -> str | None:
    kind = conv_kind(type(conv))
    assert kind is not None, 'checked before'
    shape = kind.shape(conv)
    if is_lazy(norm.running_mean) or 0 in shape:
        return None
    channels = math.prod(kind.coeff_shape(conv, shape))
    if channels != norm.running_mean.numel():
        return (f'the convolution has {channels} output channels, the BN '
                f'{norm.running_mean.numel()}')
    return None
