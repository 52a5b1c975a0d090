"""What Deploy mode does to a training step, channel by channel.

Deploy learns ``w' = coeff * w`` in the place of ``w``, with
``coeff = gamma / sqrt(var + eps)``. From the same point its step of ``w'``
is Tune's divided by ``abs(coeff) ** p``, where p is 2 for SGD and 1 for Adam.
docs/en/deploy.md derives that, and says what is exact, what is a bound and
what is a rule of thumb.

Throughout, ``coeff`` is a tensor of shape (channels,), and a learning rate is
given as a multiple of the one that Tune is trained with.
"""
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmtune.analysis.blocks import list_blocks
from mmtune.functional.fold import norm_coefficients
from mmtune.layers.normalizations import norm_kind
from mmtune.report import Report

__all__ = [
    'POWERS', 'BlockScale', 'Shares', 'best_lr', 'block_scales', 'diagnose',
    'lr_limit', 'quantiles', 'shares', 'step_ratios'
]

# By which power of the scale the steps of an optimizer differ.
POWERS = {'SGD': 2, 'Adam': 1}

QUANTILES = {'min': 0., '1%': .01, 'median': .5, '99%': .99, 'max': 1.}

# The parts of the channels for which a diagnosis gives limits.
LIMIT_SHARES = (1., .999, .99, .9, .5)


@dataclass(frozen=True)
class BlockScale:
    """The scales by which Deploy mode folds a block.

    Attributes:
        conv (str): Name of the convolution.
        bn (str): Name of the BatchNorm.
        coeff (Tensor): ``abs(gamma / sqrt(var + eps))``, shape (channels,),
            float64, on the CPU.
        gamma_learns (bool): Whether Tune mode changes the scales too.
        reason (str): Why they say nothing about training, else empty.
    """

    conv: str
    bn: str
    coeff: Tensor
    gamma_learns: bool
    reason: str = ''


class Shares(NamedTuple):
    """Which part of the channels takes which steps; they add up to 1.

    Attributes:
        slower (float): Less than Tune's divided by the factor.
        within (float): Within the factor of Tune's.
        faster (float): More than the factor times Tune's.
    """

    slower: float
    within: float
    faster: float


@torch.no_grad()
def block_scales(model: nn.Module, report: Report) -> list[BlockScale]:
    """Compute the scales of the blocks that a mode rewrites.

    Example:
        >>> scales = block_scales(model, turn_on(model, 'Tune'))

    Args:
        model (nn.Module): The model, not in Deploy mode; is not changed.
        report (Report): Of the mode, for this model or a copy of it.

    Returns:
        list[BlockScale]: One for each row of ``report.rewritten``.

    Raises:
        ValueError: If the blocks of the model itself are folded already.
    """
    scales = []
    for block in list_blocks(model, report):
        if block.mode == 'stock':
            continue
        norm = model.get_submodule(block.bn)
        kind = norm_kind(norm)
        assert kind is not None and block.conv is not None, 'in a block'
        weight, _, mean, var = kind.tensors(norm)
        assert mean is not None and var is not None, 'in a block'
        rstd, _ = norm_coefficients(mean.double(), var.double(),
                                    kind.eps(norm))
        coeff = rstd if weight is None else rstd * weight
        reason = ''
        if block.weight is None or not block.weight.learns:
            reason = 'its weight does not learn'
        elif not coeff.isfinite().all():
            reason = 'its scales are not finite'
        elif (mean == 0).all() and (var == 1).all():
            reason = 'its statistics are those of a new BatchNorm'
        scales.append(
            BlockScale(
                conv=block.conv,
                bn=block.bn,
                coeff=coeff.abs().cpu(),
                gamma_learns=block.gamma is not None and block.gamma.learns,
                reason=reason))
    return scales


def quantiles(coeff: Tensor) -> dict[str, float]:
    """Describe how far scales spread.

    Args:
        coeff (Tensor): Shape (channels,), not negative.

    Returns:
        dict[str, float]: ``'min'``, ``'1%'``, ``'median'``, ``'99%'`` and
        ``'max'``; a scale that occurs, the next lower one in between.
    """
    ordered = coeff.sort().values
    last = len(ordered) - 1
    return {
        name: ordered[int(share * last)].item()
        for name, share in QUANTILES.items()
    }


def step_ratios(coeff: Tensor, optimizer: str = 'SGD') -> Tensor:
    """Divide Deploy's steps of the weights by Tune's, learning rates equal.

    Exact from the same point with the same gradients before, while gamma and
    the statistics are fixed, for SGD with or without momentum and weight
    decay, and for Adam as far as its ``eps`` does not count.

    Args:
        coeff (Tensor): Shape (channels,).
        optimizer (str): ``'SGD'`` or ``'Adam'``. Defaults to ``'SGD'``.

    Returns:
        Tensor: Shape (channels,). Infinite where a scale is zero: there Tune
        does not move the weight.

    Raises:
        ValueError: If the optimizer is another.
    """
    return coeff.abs().pow(-_power(optimizer))


def shares(coeff: Tensor,
           factor: float,
           optimizer: str = 'SGD',
           lr: float = 1.) -> Shares:
    """Count the channels whose step is about that of Tune.

    Args:
        coeff (Tensor): Shape (channels,).
        factor (float): By how much two steps may differ to be about equal,
            at least 1.
        optimizer (str): See :func:`step_ratios`.
        lr (float): Deploy's learning rate, as a multiple of Tune's.

    Returns:
        Shares: An exact count.

    Raises:
        ValueError: If the factor is below 1, or for another optimizer.
    """
    _check_factor(factor)
    ratios = lr * step_ratios(coeff, optimizer)
    slower = (ratios < 1 / factor).double().mean().item()
    faster = (ratios > factor).double().mean().item()
    return Shares(slower, 1 - slower - faster, faster)


def lr_limit(coeff: Tensor,
             factor: float,
             optimizer: str = 'SGD',
             share: float = 1.) -> float:
    """Give the learning rate up to which Deploy's steps are not too large.

    Up to it, no channel's step is more than ``factor`` times Tune's, and
    neither is that of anything else in the model. With ``share=1`` that is a
    bound: for SGD, and near a minimum, Deploy is then stable wherever Tune at
    ``factor`` times its learning rate is. With less it is a rule of thumb,
    since one channel is enough to diverge.

    Args:
        coeff (Tensor): Shape (channels,).
        factor (float): At least 1.
        optimizer (str): See :func:`step_ratios`.
        share (float): The part of the channels that has to obey, above 0.

    Returns:
        float: A multiple of Tune's learning rate; 0 where a scale is zero.

    Raises:
        ValueError: If the factor is below 1, or for another optimizer.
    """
    _check_factor(factor)
    ordered = coeff.abs().sort().values
    # Not `len * (1 - share)`, which rounding makes one less.
    exempt = int(len(ordered) - share * len(ordered))
    smallest = ordered[exempt].item()**_power(optimizer)
    # Biases and other layers step as in Tune, whatever the scales are.
    return factor * min(1., smallest)


def best_lr(coeff: Tensor,
            factor: float,
            optimizer: str = 'SGD') -> tuple[float, float]:
    """Find the learning rate at which most channels follow Tune.

    Args:
        coeff (Tensor): Shape (channels,).
        factor (float): See :func:`shares`.
        optimizer (str): See :func:`step_ratios`.

    Returns:
        tuple[float, float]: The learning rate, as a multiple of Tune's, and
        the part of the channels whose steps of the weight are then within
        the factor of Tune's. None has more, as long as everything else in
        the model is to be within the factor as well.

    Raises:
        ValueError: If the factor is below 1, or for another optimizer.
    """
    _check_factor(factor)
    # In logarithms, the channels within the factor of a learning rate are
    # those no farther from it than this.
    reach = math.log(factor)
    places = (_power(optimizer) * coeff.abs().log()).sort().values
    # Most intervals overlap where one of them begins.
    starts = (places - reach).clamp(-reach, reach)
    # Rounding must not put a channel at the very edge outside.
    first = torch.searchsorted(places, starts - reach - 1e-9)
    last = torch.searchsorted(places, starts + reach + 1e-9, right=True)
    counts = last - first
    most = int(counts.argmax())
    lr = starts[most].item()
    if counts[most]:
        # All of these learning rates have the same channels.
        lower = max(places[last[most] - 1].item() - reach, -reach)
        upper = min(places[first[most]].item() + reach, reach)
        lr = (lower + upper) / 2
    return math.exp(lr), counts[most].item() / len(coeff)


def diagnose(coeff: Tensor,
             factor: float,
             optimizer: str = 'SGD') -> dict[str, Any]:
    """Put together what the scales of a block, or of all, mean for training.

    Args:
        coeff (Tensor): Shape (channels,).
        factor (float): By how much Deploy's steps may differ from Tune's.
        optimizer (str): See :func:`step_ratios`.

    Returns:
        dict[str, Any]: Plain data. ``channels`` and how many of them are
        ``zeros``; ``coeff``, see :func:`quantiles`; ``at_same_lr``, see
        :func:`shares`; ``limits``, see :func:`lr_limit`, from all channels
        to half of them; ``best``, see :func:`best_lr`. Learning rates are
        multiples of Tune's.

    Raises:
        ValueError: If the factor is below 1, or for another optimizer.
    """
    lr, share = best_lr(coeff, factor, optimizer)
    return dict(
        channels=len(coeff),
        zeros=int((coeff == 0).sum()),
        coeff=quantiles(coeff),
        at_same_lr=shares(coeff, factor, optimizer)._asdict(),
        limits=[
            dict(share=share, lr=lr_limit(coeff, factor, optimizer, share))
            for share in LIMIT_SHARES
        ],
        best=dict(share=share, lr=lr))


def _power(optimizer: str) -> int:
    if optimizer not in POWERS:
        raise ValueError(f'`optimizer` must be one of {", ".join(POWERS)}, '
                         f'but got {optimizer!r}')
    return POWERS[optimizer]


def _check_factor(factor: float) -> None:
    if not factor >= 1:
        raise ValueError(f'`factor` must be at least 1, but got {factor!r}')
