"""Put a model into any of the modes that are compared."""
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from mmtune.api import turn_on
from mmtune.arguments import select
from mmtune.report import Report

__all__ = ['MODES', 'PAPERS_TUNE', 'put_in_mode', 'randomize_new_norms']

# Tune mode as it is in the paper, which leaves activations as they are.
PAPERS_TUNE = 'Tune, stock activations'
# 'MMEngine' is Eval mode with MMEngine's own rewrite of the paper's idea.
MODES = ('Train', 'Eval', 'MMEngine', PAPERS_TUNE, 'Tune', 'Deploy')


def put_in_mode(model: nn.Module,
                mode: str,
                modules: Sequence[str] | None = None) -> Report | None:
    """Put a stock model into a mode, ready for a training step.

    Args:
        model (nn.Module): Is in train mode afterwards, but for its
            BatchNorms.
        mode (str): One of :data:`MODES`. In Train and Eval the modules stay
            stock.
        modules (Sequence[str], optional): Names of the submodules whose
            BatchNorms it is about. Defaults to None: the whole model.

    Returns:
        Report: Of Tune, in both of its ways, and Deploy; else None.

    Raises:
        ValueError: For another mode, if a name in ``modules`` does not
            exist, or where there is nothing to rewrite.
        Exception: Whatever MMEngine's rewrite raises on this model.
    """
    if mode not in MODES:
        raise ValueError(f'`mode` must be one of {", ".join(MODES)}, but got '
                         f'{mode!r}')
    parts = select(model, modules)
    members = [module for part in parts for module in part.modules()]
    for module in members:
        # MMDetection's backbones do in train() what this says.
        if hasattr(module, 'norm_eval'):
            module.norm_eval = mode != 'Train'
    model.train()
    if mode == 'Train':
        return None
    for module in members:
        if isinstance(module, _BatchNorm):
            module.eval()
    if mode == 'MMEngine':
        _rewrite_by_mmengine(parts)
    if mode == PAPERS_TUNE:
        return turn_on(model, modules=modules, activations=False)
    if mode in ('Tune', 'Deploy'):
        return turn_on(model, mode, modules=modules)
    return None


def _rewrite_by_mmengine(parts: Sequence[nn.Module]) -> None:
    from mmengine.model.efficient_conv_bn_eval import (
        turn_on_efficient_conv_bn_eval_for_single_model,
    )
    for part in parts:
        turn_on_efficient_conv_bn_eval_for_single_model(part)


@torch.no_grad()
def randomize_new_norms(model: nn.Module) -> None:
    """Give BatchNorms that were never trained statistics that matter.

    Those of a new BatchNorm, with which a fold changes nothing, would make
    every comparison of modes come out well.

    Args:
        model (nn.Module): BatchNorms with other statistics stay.

    Raises:
        ValueError: If a layer waits for its first input to get its shape.
    """
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if is_lazy(norm.running_mean):
            raise ValueError(
                'layers must have a shape, but a '
                f'{type(norm).__name__} waits for its first input; run the '
                'model once where it is built')
        if norm.running_mean.any() or (norm.running_var != 1).any():
            continue
        norm.running_mean.normal_(std=0.1, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
        if norm.affine:
            norm.weight.uniform_(0.5, 1, generator=generator)
            norm.bias.normal_(std=0.1, generator=generator)
