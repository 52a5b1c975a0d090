"""List the Conv+BN blocks of a model with all that decides how they run."""
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmtune.deploy import FoldedNorm
from mmtune.layers.normalizations import norm_kind
from mmtune.report import Report

__all__ = ['Block', 'TensorInfo', 'list_blocks']


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a block.

    Attributes:
        shape (tuple[int, ...], optional): None for a layer that takes its
            shape from its first input, and for a weight that is made anew
            from several parameters at every call.
        dtype (str): Such as ``'float32'``.
        learns (bool): Whether it, or what it is made from, needs a gradient.
    """

    shape: tuple[int, ...] | None
    dtype: str
    learns: bool


@dataclass(frozen=True)
class Block:
    """A convolution and its BatchNorm, or a BatchNorm alone.

    Attributes:
        conv (str, optional): Name of the convolution, None where the
            BatchNorm does not follow one.
        bn (str): Name of the BatchNorm.
        conv_type (str, optional): Name of the convolution's class.
        bn_type (str): Name of the BatchNorm's class.
        mode (str): What :class:`mmtune.report.Row` says: a mode, or
            ``'stock'``.
        reason (str): Why it is left out, else empty.
        bn_is_fixed (bool): Whether a call of now would use the running
            statistics. Else the block would run as stock, in Tune mode too.
        out_channels (int, optional): None where it is not known yet.
        weight (TensorInfo, optional): Of the convolution.
        bias (TensorInfo, optional): Of the convolution.
        gamma (TensorInfo, optional): ``bn.weight``.
        beta (TensorInfo, optional): ``bn.bias``.
    """

    conv: str | None
    bn: str
    conv_type: str | None
    bn_type: str
    mode: str
    reason: str
    bn_is_fixed: bool
    out_channels: int | None
    weight: TensorInfo | None
    bias: TensorInfo | None
    gamma: TensorInfo | None
    beta: TensorInfo | None

    @property
    def runs(self) -> str:
        """What the block does in a step as the model is now.

        Returns:
            str: The mode; or ``'left out'``; or ``'BN trains'`` where a Tune
            block runs as stock because its BatchNorm is in train mode.
        """
        if self.mode == 'stock':
            return 'left out'
        if self.mode == 'Tune' and not self.bn_is_fixed:
            return 'BN trains'
        return self.mode


def list_blocks(model: nn.Module, report: Report) -> list[Block]:
    """Describe the rows of a report. Changes nothing, runs nothing.

    Example:
        >>> model.train()
        >>> blocks = list_blocks(model, turn_on(model))

    Args:
        model (nn.Module): The model of the report, in the state that is
            asked about.
        report (Report): What :func:`mmtune.turn_on` returned.

    Returns:
        list[Block]: One for each row.

    Raises:
        ValueError: If the blocks are folded already.
    """
    blocks = []
    for row in report.rows:
        norm = _unfolded(model, row.bn)
        kind = norm_kind(norm)
        conv = None if row.conv is None else model.get_submodule(row.conv)
        blocks.append(
            Block(
                conv=row.conv,
                bn=row.bn,
                conv_type=None if conv is None else type(conv).__name__,
                bn_type=type(norm).__name__,
                mode=row.mode,
                reason=row.reason,
                bn_is_fixed=(not norm.training
                             if kind is None else kind.is_fixed(norm)),
                out_channels=_out_channels(conv, norm),
                weight=_describe(conv, 'weight'),
                bias=_describe(conv, 'bias'),
                gamma=_describe(norm, 'weight'),
                beta=_describe(norm, 'bias')))
    return blocks


def _unfolded(model: nn.Module, name: str) -> nn.Module:
    norm = model.get_submodule(name)
    if isinstance(norm, FoldedNorm):
        raise ValueError(
            f'{name!r} is folded into {norm.conv!r} and its statistics are '
            'gone; pass a model that is not in Deploy mode')
    return norm


def _out_channels(conv: nn.Module | None, norm: nn.Module) -> int | None:
    for module, name in ((conv, 'out_channels'), (conv, 'out_features'),
                         (norm, 'num_features')):
        count = getattr(module, name, None)
        if count:
            return int(count)
    mean = norm._buffers.get('running_mean')
    return None if mean is None or is_lazy(mean) else mean.numel()


def _describe(module: nn.Module | None, name: str) -> TensorInfo | None:
    if module is None:
        return None
    own = {**module._buffers, **module._parameters}
    if name in own:
        return None if own[name] is None else _info([own[name]])
    # A parametrized or a pruned one: to ask for it might change it.
    origins = (f'parametrizations.{name}.', f'{name}_')
    return _info([
        parameter for path, parameter in module.named_parameters()
        if path.startswith(origins)
    ])


def _info(tensors: list[Tensor]) -> TensorInfo | None:
    if not tensors:
        return None
    first = tensors[0]
    known = len(tensors) == 1 and not is_lazy(first)
    return TensorInfo(
        shape=tuple(first.shape) if known else None,
        dtype=str(first.dtype).removeprefix('torch.'),
        learns=any(tensor.requires_grad for tensor in tensors))
