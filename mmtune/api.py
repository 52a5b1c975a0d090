"""``turn_on`` and ``turn_off``: put a model into one of the paper's modes."""
from collections import Counter
from collections.abc import Sequence

from torch import nn

from mmtune.arguments import (
    check_activations,
    check_mode,
    check_module,
    check_norm_eval,
    select,
)
from mmtune.behaviours.activation import (
    activation_runs,
    attach_activations,
    find_activations,
)
from mmtune.behaviours.blocks import BlockState, Pair, attach_block
from mmtune.behaviours.buffers import ConvBuffers
from mmtune.behaviours.convolution import attach_conv
from mmtune.behaviours.held import hold_norms
from mmtune.behaviours.normalization import attach_norm
from mmtune.deploy import check_not_deployed, deploy, fit_for_good
from mmtune.layers.normalizations import looks_like_norm, norm_kind
from mmtune.matching.pairs import OWN_OPTION, Matches, find_pairs, norms_of
from mmtune.report import Report, Row
from mmtune.utils.attach import detach

__all__ = [
    'NothingFound', 'activation_runs', 'latest_runs', 'turn_off', 'turn_on'
]


class NothingFound(ValueError):
    """The chosen modules hold nothing to put into a mode."""


def turn_on(model: nn.Module,
            mode: str = 'Tune',
            modules: str | Sequence[str] | None = None,
            norm_eval: bool | None = None,
            activations: bool = True) -> Report:
    """Put the Conv+BN blocks of a model into a mode, in place.

    ======  ==============================  ==============================
    mode    forward                         kept for backward by a block
    ======  ==============================  ==============================
    Train   batch statistics                input, convolution's output
    Eval    running statistics              input, convolution's output
    Tune    folded anew at every call       input
    Deploy  folded once, for good           input
    ======  ==============================  ==============================

    (arXiv 2305.11624, Table 1.) Tune gives the outputs and gradients of
    Eval. A block whose BatchNorm is in train mode at some call runs that
    call as stock, as does anything that cannot be folded.

    Beyond the paper, Tune mode has activations keep one feature map with
    whoever reads their output, whatever their neighbours are (see
    :mod:`mmtune.layers.activations`).

    Parameters keep their identity; names, state_dict and ``isinstance`` stay
    stock in every mode but Deploy. A second call on the same modules
    replaces the first.

    Args:
        model (nn.Module): Any model.
        mode (str): ``'Train'``, ``'Eval'``, ``'Tune'`` or ``'Deploy'``, in
            any case. Defaults to ``'Tune'``.
        modules (str | Sequence[str], optional): Names of submodules, dotted
            for nested ones, to restrict the call to. Defaults to None: the
            whole model.
        norm_eval (bool, optional): True holds every BatchNorm of the chosen
            modules in eval mode, through later ``model.train()`` calls too.
            Modes ``'Eval'`` and ``'Train'`` hold them in any case. Defaults
            to None, the same as False: BatchNorms obey ``train()``.
        activations (bool): Whether activations keep one map in mode
            ``'Tune'``; in others they are stock. Defaults to True.

    Returns:
        Report: A row for every block, and for every normalization left out;
        and the activations that are to keep one map.

    Raises:
        TypeError: If ``model`` is no module, or ``modules`` no names.
        ValueError: If ``mode`` is not one of the four, a name in ``modules``
            does not exist, ``norm_eval`` contradicts ``mode``,
            ``activations`` is no bool, or there is nothing to put into that
            mode (a :class:`NothingFound`). The model is then as it was.
        RuntimeError: If blocks of the model are in Deploy mode already.
    """
    check_module(model)
    mode = check_mode(mode)
    hold = check_norm_eval(mode, norm_eval)
    check_activations(activations)
    roots = select(model, modules)
    for root in roots:
        check_not_deployed(root)
    matches = find_pairs(model, roots)
    if mode == 'Deploy':
        matches = fit_for_good(model, matches)
    found = {}
    if mode == 'Tune' and activations:
        found = find_activations(model, roots)
    _check_not_empty(mode, roots, matches, bool(found))

    for root in roots:
        _release(root)
    if hold is not None:
        for root in roots:
            hold_norms(root, norms_of(root), hold)
    if mode == 'Tune':
        _tune(model, matches)
        attach_activations(roots, list(found.values()))
    elif mode == 'Deploy':
        deploy(model, matches)
    return make_report(model, mode, matches, list(found))


def turn_off(model: nn.Module) -> None:
    """Make a model stock again: same Parameters, same values.

    BatchNorms that were held follow the latest ``train()`` or ``eval()``.

    Args:
        model (nn.Module): A model, or a part of one, after any number of
            calls of :func:`turn_on`.

    Raises:
        TypeError: If ``model`` is no module.
        RuntimeError: If it is in Deploy mode, which has no way back.
    """
    check_module(model)
    check_not_deployed(model)
    _release(model)


def latest_runs(model: nn.Module) -> dict[str, str]:
    """How each block of a model in Tune mode ran the last time.

    Args:
        model (nn.Module): After :func:`turn_on`.

    Returns:
        dict[str, str]: By the name of the BatchNorm: ``'fused'``,
        ``'stock'``, ``'small'`` (stock, since that is cheaper for maps so
        small), ``'train mode'`` (stock, with the statistics of the batch),
        ``'replaced'`` (stock, since one of its layers is another than the one
        that was turned on) or ``'not run'``.
    """
    names = {
        module._tune_norm: name for name, module in model.named_modules()
        if '_tune_norm' in vars(module)
    }
    runs = {name: state.latest_run() for state, name in names.items()}
    for name, module in model.named_modules():
        if '_tune_block' in vars(module):
            for pair in module._tune_block.replaced(module):
                path = '.'.join((name, *pair.norm_path)).lstrip('.')
                # Within a wrapper the norm has another name.
                runs[names.get(pair.norm, path)] = 'replaced'
    return runs


# --------------------------------------------------------------------------
# Checks: nothing below changes a model
# --------------------------------------------------------------------------


def _check_not_empty(mode: str, roots: list[nn.Module],
                     matches: Matches, has_activations: bool) -> None:
    if matches.pairs or has_activations:
        return
    if mode in ('Train', 'Eval') and any(
            left.held for left in matches.left_out):
        return
    found = Counter(
        type(m).__name__ for root in roots for m in root.modules()
        if looks_like_norm(m))
    text = ', '.join(f'{count} {name}' for name, count in found.items())
    reasons = Counter(row.reason for row in matches.left_out)
    why = ''.join(f'; {count} x {reason}' for reason, count in reasons.items())
    raise NothingFound(
        f'There is nothing to put into {mode} mode in the chosen modules: '
        f'expected convolutions followed by BatchNorm, but found '
        f'{text or "no normalization"}{why}')


# --------------------------------------------------------------------------
# Changes
# --------------------------------------------------------------------------


def _release(root: nn.Module) -> None:
    for module in root.modules():
        own = vars(module)
        if '_tune_own_option' in own:
            own[OWN_OPTION] = own['_tune_own_option']
        for key in ('_tune_conv', '_tune_norm', '_tune_held'):
            if key in own:
                own[key].is_on = False
        if isinstance(own.get('_buffers'), ConvBuffers):
            own['_buffers'] = dict(own['_buffers'])
        held = own.get('_tune_held')
        detach(module)
        if held is not None:
            module.train(held.asked)


def _tune(model: nn.Module, matches: Matches) -> None:
    states: dict[nn.Module, BlockState] = {}
    for match in matches.pairs:
        block, conv, norm = (
            model.get_submodule(name)
            for name in (match.block, match.conv, match.norm))
        kind = norm_kind(norm)
        assert kind is not None, 'a match has a known normalization'
        if block not in states:
            states[block] = BlockState()
        states[block].pairs.append(
            Pair(
                attach_conv(match.conv, conv, norm, kind),
                attach_norm(match.norm, norm, kind),
                tuple(match.conv_path.split('.')),
                tuple(match.norm_path.split('.')),
                tuple(tuple(path.split('.')) for path in match.via)))
    for block, state in states.items():
        attach_block(block, state)
        if vars(block).get(OWN_OPTION) is not None:
            vars(block).update({
                '_tune_own_option': vars(block)[OWN_OPTION],
                OWN_OPTION: None
            })


def make_report(model: nn.Module,
                mode: str,
                matches: Matches,
                activations: Sequence[str] = ()) -> Report:
    """Write down the rows of a report.

    Args:
        model (nn.Module): In the mode already.
        mode (str): The mode.
        matches (Matches): The pairs in it, and what is left out.
        activations (Sequence[str]): Names of those that are to keep one map.

    Returns:
        Report: See :func:`turn_on`.
    """
    # A pair may be called by several blocks.
    pairs = {(match.conv, match.norm): match.stock for match in matches.pairs}
    rows = [
        Row(conv, norm, 'stock', reason)
        if reason and mode == 'Tune' else Row(conv, norm, mode)
        for (conv, norm), reason in pairs.items()
    ]
    for left in matches.left_out:
        held = left.held and mode in ('Train', 'Eval')
        rows.append(
            Row(left.conv, left.norm, mode if held else 'stock',
                '' if held else left.reason))
    in_train_mode = 0
    if mode == 'Tune':
        norms = [model.get_submodule(norm) for _, norm in pairs]
        in_train_mode = sum(not norm._tune_norm.kind.is_fixed(norm)
                            for norm in norms)
    return Report(mode, rows, in_train_mode, list(activations))
