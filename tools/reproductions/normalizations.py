"""Which normalizations can be folded into a convolution, and which cannot."""
import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mmtune import turn_on
from mmtune.analysis import saved_bytes
from mmtune.analysis.steps import difference
from mmtune.api import latest_runs
from reproductions.page import MIB, Page, cell, drawing, mib, table

CHANNELS = 32
# Of an error in float64 that is rounding.
TOLERANCE = 1e-9


class FrozenBatchNorm2d(nn.Module):
    """A BatchNorm of buffers alone, as detectors have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.register_buffer('weight', torch.ones(channels))
        self.register_buffer('bias', torch.zeros(channels))
        self.register_buffer('running_mean', torch.zeros(channels))
        self.register_buffer('running_var', torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


class BatchRenorm2d(nn.BatchNorm2d):
    """Batch renormalization (arXiv 1702.03275), in train mode.

    The batch's statistics, corrected towards the running ones by factors
    within limits that learn nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        std, running_std = ((v + self.eps).sqrt()
                            for v in (var, self.running_var))
        with torch.no_grad():
            r = (std / running_std).clamp(1 / 3, 3)
            d = ((mean - self.running_mean) / running_std).clamp(-5, 5)
        scale = self.weight * r / std
        shift = self.bias + self.weight * d - mean * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


class Whitening2d(nn.Module):
    """Decorrelated BatchNorm (arXiv 1804.08450), by running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(channels, channels, generator=generator)
        self.register_buffer('matrix', torch.eye(channels) + .1 * noise)
        self.register_buffer('running_mean', torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        centred = x - self.running_mean.view(-1, 1, 1)
        return torch.einsum('dc,nchw->ndhw', self.matrix, centred)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def conv(kind: type = nn.Conv2d) -> nn.Module:
    return kind(CHANNELS, CHANNELS, 3, padding=1, bias=False)


def weight_norm_conv() -> nn.Module:
    return parametrizations.weight_norm(conv())


# What a normalization normalizes by.
RUNNING, BATCH, SAMPLE, PIXEL = ('running', 'of the batch', 'of the sample',
                                 'of the pixel')


class Case(NamedTuple):
    """A convolution and a normalization.

    Attributes:
        norm (Callable): Gives the normalization of a number of channels.
        statistics (str): What it normalizes by.
        training (bool): Whether it is in train mode.
        conv (Callable): Gives the convolution.
    """

    norm: Callable[[int], nn.Module]
    statistics: str = RUNNING
    training: bool = False
    conv: Callable[[], nn.Module] = conv


instance_norm = partial(nn.InstanceNorm2d, affine=True)
tracking = partial(instance_norm, track_running_stats=True)
group_norm = partial(nn.GroupNorm, 8)
standardized, affine_standardized = (
    partial(conv, kind) for kind in (ConvWS2d, ConvAWS2d))
CASES = {
    'BatchNorm, eval': Case(nn.BatchNorm2d),
    'BatchNorm, train': Case(nn.BatchNorm2d, BATCH, training=True),
    'SyncBatchNorm, eval': Case(nn.SyncBatchNorm),
    'FrozenBatchNorm': Case(FrozenBatchNorm2d, training=True),
    'InstanceNorm with running statistics, eval': Case(tracking),
    'InstanceNorm with running statistics, train': Case(
        tracking, SAMPLE, training=True),
    'InstanceNorm': Case(instance_norm, SAMPLE),
    'GroupNorm': Case(group_norm, SAMPLE),
    'LayerNorm': Case(LayerNorm2d, PIXEL),
    'LocalResponseNorm': Case(lambda _: nn.LocalResponseNorm(5), PIXEL),
    'batch renormalization, eval': Case(BatchRenorm2d),
    'batch renormalization, train': Case(BatchRenorm2d, BATCH, training=True),
    'whitening, eval': Case(Whitening2d),
    'ConvWS + BatchNorm, eval': Case(nn.BatchNorm2d, conv=standardized),
    'ConvAWS + BatchNorm, eval': Case(
        nn.BatchNorm2d, conv=affine_standardized),
    'weight_norm + BatchNorm, eval': Case(
        nn.BatchNorm2d, conv=weight_norm_conv),
    'ConvWS + GroupNorm': Case(group_norm, SAMPLE, conv=standardized),
}


def make_blocks(case: Case) -> nn.Sequential:
    """Make the block in question, and one that always can be folded.

    Without the second there would be nothing to turn on where the first
    cannot be.
    """
    torch.manual_seed(0)
    blocks = nn.Sequential(
        nn.Sequential(case.conv(), case.norm(CHANNELS)),
        nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS).eval()))
    norm = blocks[0][1].train(case.training)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.shape == (CHANNELS, ):
                tensor.uniform_(.5, 1.5)
    return blocks


@torch.no_grad()
def departures(norm: nn.Module) -> dict[str, float]:
    """Test in float64 whether a normalization is one fixed function.

    Returns:
        dict[str, float]: ``per_channel``: how far the output for random
        inputs is from ``a * y + b``, with ``a`` and ``b`` of each channel
        found from two other inputs; ``affine``: how far that of a mixture of
        two inputs is from the mixture of their outputs. Both relative to the
        norm of the output.
    """
    generator = torch.Generator().manual_seed(0)

    def randn() -> Tensor:
        return torch.randn(
            2, CHANNELS, 8, 8, generator=generator, dtype=torch.float64)

    def run(y: Tensor) -> Tensor:
        # In train mode, statistics move with every call.
        return copy.deepcopy(norm).double()(y)

    y, first, second = 2 * randn() + 1, randn(), 3 * randn() - 1
    low, high = run(first), run(second)
    slope = ((high - low) / (second - first)).mean((0, 2, 3), keepdim=True)
    offset = (low - slope * first).mean((0, 2, 3), keepdim=True)
    output = run(y)
    mixture = run(.3 * first + .7 * second)
    return dict(
        per_channel=float((slope * y + offset - output).norm()
                          / output.norm()),
        affine=float((.3 * low + .7 * high - mixture).norm()
                     / mixture.norm()))


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    return dict(output=output.detach(), x=x.grad,
                **{name: p.grad for name, p in model.named_parameters()})


def kept(block: nn.Module, x: Tensor) -> int:
    """Bytes that a block keeps for backward."""
    with saved_bytes(block) as saved:
        # What is kept lives as long as the output does.
        _output = block(x)
        return saved.total


def measure(case: Case, size: int) -> dict[str, Any]:
    """Find out everything about one case."""
    stock = make_blocks(case)
    tuned = copy.deepcopy(stock)
    report = turn_on(tuned, activations=False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS, size, size, generator=generator)
    bytes_kept = {
        mode: kept(copy.deepcopy(blocks)[0], x)
        for mode, blocks in (('Eval', stock), ('Tune', tuned))
    }
    expected = step(copy.deepcopy(stock)[0].double(), x.double())
    actual = step(tuned.double()[0], x.double())
    return dict(
        statistics=case.statistics,
        **departures(stock[0][1]),
        kept=bytes_kept,
        ran=latest_runs(tuned).get('0.1', 'left alone'),
        error=difference(actual, expected),
        reason=''.join(
            row.reason for row in report.left_out if row.bn == '0.1'))


def run(size: int = 64) -> dict:
    """Try every normalization, on maps of a height and width."""
    return dict(size=size, rows={
        name: measure(CASES[name], size)
        for name in track(CASES, 'Try normalizations')
    })


def can_be_folded(row: dict) -> bool:
    """Tell whether it is one scale and one shift of each channel."""
    return row['per_channel'] <= TOLERANCE


def kind_of(row: dict) -> str:
    """What the measurement says of a normalization."""
    if can_be_folded(row):
        return 'a scale and a shift of each channel'
    if row['affine'] <= TOLERANCE:
        return 'affine, across channels'
    return 'depends on its input'


def keeps_less(row: dict) -> bool:
    """Tell whether Tune keeps less than stock, by more than a trifle."""
    return row['kept']['Tune'] < .95 * row['kept']['Eval']


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    rows = [dict(row, name=name) for name, row in found['rows'].items()]
    folded = [row for row in rows if row['ran'] == 'fused']
    return dict(
        can=sum(map(can_be_folded, rows)),
        cases=len(rows),
        folded=len(folded),
        less=sum(map(keeps_less, folded)),
        channels=CHANNELS,
        maps=f'2 x {CHANNELS} x {found["size"]} x {found["size"]}',
        functions=table(rows, {
            'normalization': cell('', 'name'),
            'statistics': cell('', 'statistics'),
            'from a, b': cell('.0e', 'per_channel'),
            'from affine': cell('.0e', 'affine'),
            'so it is': kind_of
        }),
        blocks=table(rows, {
            'normalization': cell('', 'name'),
            'stock': lambda row: mib(row['kept']['Eval']),
            'Tune': lambda row: mib(row['kept']['Tune']),
            'ran': cell('', 'ran'),
            'difference': cell('.0e', 'error'),
            'reason': cell('', 'reason')
        }))


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    rows = found['rows']
    can = {name for name, row in rows.items() if can_be_folded(row)}
    folded = {name for name, row in rows.items() if row['ran'] == 'fused'}
    return {
        'mmtune folds all that can be folded': can <= folded,
        'mmtune folds nothing else': folded <= can,
        'all results are those of stock':
        all(row['error'] <= TOLERANCE for row in rows.values()),
        'what is left alone keeps as much as before':
        all(row['kept']['Tune'] == row['kept']['Eval']
            for name, row in rows.items() if name not in folded),
        'of what is folded, FrozenBatchNorm alone keeps as much as before':
        [name for name in rows if name in folded
         and not keeps_less(rows[name])] == ['FrozenBatchNorm'],
        'a normalization of the weight is no obstacle':
        all(name in folded for name in rows if '+ BatchNorm, eval' in name),
        'what is fixed, and of each channel by itself, can be folded':
        can == {name for name, row in rows.items()
                if row['statistics'] == RUNNING} - {'whitening, eval'},
        'whitening is a fixed matrix across channels':
        kind_of(rows['whitening, eval']).startswith('affine')
    }


@drawing(7)
def plot(found: dict, figure: Figure) -> None:
    """Draw what each block keeps for backward."""
    rows = found['rows']
    figure.set_size_inches(8, 1.5 + .35 * len(rows))
    axes = figure.subplots()
    for offset, mode, color in ((-.2, 'Eval', 'tab:gray'),
                                (.2, 'Tune', 'tab:green')):
        axes.barh([i + offset for i in range(len(rows))],
                  [row['kept'][mode] / MIB for row in rows.values()], .4,
                  color=color, label='stock' if mode == 'Eval' else 'Tune')
    axes.set_yticks(range(len(rows)), labels=list(rows))
    axes.invert_yaxis()
    axes.set(xlabel='kept for backward by convolution and normalization, MiB')
    figure.legend(loc='outside upper right', ncols=2)


PAGE = Page(run, figures, claims, plot)
