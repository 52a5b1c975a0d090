"""Deploy mode: fold for good, with no way back."""
from collections import Counter

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mmtune.functional.fold import fold, norm_coefficients
from mmtune.layers.convolutions import conv_kind
from mmtune.layers.kinds import ConvKind, NormKind
from mmtune.layers.normalizations import norm_kind
from mmtune.matching.pairs import LeftOut, Matches, find_pairs
from mmtune.utils.attach import has_hooks

__all__ = ['FoldedNorm', 'check_not_deployed', 'deploy', 'fit_for_good']


class FoldedNorm(nn.Identity):
    """Stands where Deploy mode folded a BatchNorm away.

    Args:
        conv (str): Name of the convolution that it was folded into.
    """

    def __init__(self, conv: str) -> None:
        super().__init__()
        self.conv = conv

    def extra_repr(self) -> str:
        """Say which convolution holds the normalization now."""
        return f'folded into {self.conv}'


def check_not_deployed(model: nn.Module) -> None:
    """Raise a RuntimeError where blocks were folded for good."""
    folded = sum(isinstance(m, FoldedNorm) for m in model.modules())
    if folded:
        raise RuntimeError(
            f'{folded} blocks are in Deploy mode, which folds for good; '
            'build the model anew and load its checkpoint to leave it')


def fit_for_good(model: nn.Module, matches: Matches) -> Matches:
    """Leave out what Deploy cannot fold: it has to be sure of every use."""
    sole = {
        (match.conv, match.norm)
        for match in find_pairs(model, [model]).pairs if match.sole
    }
    owners = Counter(
        id(p) for m in model.modules() for p in m._parameters.values())
    pairs, left_out = [], list(matches.left_out)
    for match in matches.pairs:
        conv = model.get_submodule(match.conv)
        norm = model.get_submodule(match.norm)
        parameters = [
            p for m in (conv, norm) for p in m._parameters.values()
            if p is not None
        ]
        if match.stock:
            reason = match.stock
        elif (match.conv, match.norm) not in sole:
            reason = 'Deploy needs a pair that is called once on every way'
        elif 'weight' not in conv._parameters:
            reason = 'Deploy needs a weight that is a plain parameter'
        elif is_lazy(conv.weight) or is_lazy(norm.running_mean):
            reason = 'Deploy needs layers that are initialized'
        elif _norm_kind(norm).does_more:
            reason = f'{type(norm).__name__} does more than normalize'
        elif type(_kind(conv)).weight is not ConvKind.weight:
            reason = f'{type(conv).__name__} makes a weight of its own'
        elif 'bias' not in conv._parameters:
            reason = f'{type(conv).__name__} takes no bias'
        elif any(owners[id(p)] > 1 for p in parameters):
            reason = 'Deploy needs parameters that no other module shares'
        elif has_hooks(conv) or has_hooks(norm):
            reason = 'Deploy would run past the hooks of the pair'
        else:
            pairs.append(match)
            continue
        left_out.append(LeftOut(match.norm, match.conv, reason))
    return Matches(pairs, left_out)


def _kind(conv: nn.Module) -> ConvKind:
    kind = conv_kind(type(conv))
    assert kind is not None, 'a match has a known convolution'
    return kind


def _norm_kind(norm: nn.Module) -> NormKind:
    kind = norm_kind(norm)
    assert kind is not None, 'a match has a known normalization'
    return kind


@torch.no_grad()
def deploy(model: nn.Module, matches: Matches) -> None:
    """Fold each pair for good.

    Parameters of the model go on to serve: the convolution's weight, and its
    bias or else the BatchNorm's, so that an optimizer built beforehand
    trains the folded ones.
    """
    for match in matches.pairs:
        conv = model.get_submodule(match.conv)
        norm = model.get_submodule(match.norm)
        weight, bias = fold(
            conv.weight, conv.bias, norm.weight, norm.bias,
            *norm_coefficients(norm.running_mean, norm.running_var,
                               _norm_kind(norm).eps(norm)),
            _kind(conv).coeff_shape(conv, conv.weight.shape))
        if conv.bias is None:
            conv.bias = norm._parameters.get('bias')
        if conv.bias is None:
            # One that is made in inference mode could not learn outside.
            with torch.inference_mode(False):
                conv.bias = nn.Parameter(
                    bias.to(conv.weight, copy=True),
                    conv.weight.requires_grad)
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        owner, _, name = match.norm.rpartition('.')
        setattr(model.get_submodule(owner), name, FoldedNorm(match.conv))
