"""Measure where scaling the map becomes dearer than folding the weight.

For blocks of several shapes and maps of several sizes: the time of each plan
of the native node, forward plus backward or forward alone, as a share of stock
Eval's. The crossing is what ``kMapPerWeight`` in ``mmtune/csrc/fold.cpp``
says::

    python tests/benchmarks/plans.py [--no-gradient] [--dtype bfloat16]
"""
import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mmtune.analysis.timing import interleaved_seconds, quartiles
from mmtune.functional.fold import Plan, fold_and_run_norm
from mmtune.functional.geometry import Convolution

# Channels, kernel, groups, and the sides of maps to try.
SHAPES = (
    (8, 1, 1, (2, 4, 8, 16)),
    (64, 1, 1, (4, 8, 16, 32)),
    (256, 1, 1, (4, 8, 16, 32)),
    (512, 1, 1, (4, 8, 16, 24)),
    (64, 3, 1, (4, 8, 16, 32)),
    (256, 3, 1, (4, 8, 16, 32)),
    (64, 3, 64, (2, 4, 8, 16)),
)
BATCH = 2


def run(block: nn.Sequential, plan: Plan, x: Tensor) -> Tensor:
    """Run a pair by the native node."""
    conv, norm = block
    geometry = Convolution(conv.stride, conv.padding, conv.dilation, False,
                           (0, 0), conv.groups)
    return fold_and_run_norm(geometry, x, conv.weight, conv.bias, norm.weight,
                             norm.bias, norm.running_mean, norm.running_var,
                             norm.eps, (-1, 1, 1, 1), plan)


def step(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor,
         learned: list[Tensor]) -> None:
    """Go forward, and back where something learns; keep no gradient."""
    with torch.autocast('cpu', x.dtype, enabled=x.dtype != torch.float32):
        output = forward(x)
    if learned:
        torch.autograd.grad(output, learned, grad)


def measure(channels: int, kernel: int, groups: int, size: int,
            dtype: torch.dtype, learns: bool,
            rounds: int) -> list[dict[str, float]]:
    """Time stock Eval and both plans, in seconds, side by side."""
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2,
                     groups=groups, bias=False)
    block = nn.Sequential(conv, nn.BatchNorm2d(channels)).eval()
    nn.init.uniform_(block[1].running_var, .5, 2)
    x = torch.randn(BATCH, channels, size, size, dtype=dtype)
    grad = torch.randn_like(x)
    learned = [x, *block.parameters()] if learns else []
    for tensor in (x, *block.parameters()):
        tensor.requires_grad_(learns)
    forwards = {'Eval': block, 'fold': partial(run, block, Plan.FOLD),
                'scale': partial(run, block, Plan.SCALE)}
    calls = {name: partial(step, forward, x, grad, learned)
             for name, forward in forwards.items()}
    return list(interleaved_seconds(calls, rounds, at_least=.002))


def main() -> None:
    """Print a row for each shape and size."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument(
        '--no-gradient', action='store_true',
        help='time the forward where nothing learns, as in validation')
    parser.add_argument(
        '--dtype', choices=['float32', 'bfloat16', 'float16'],
        default='float32', help='of the map; half precision by autocast')
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print('channels kernel groups size  map/weight  Eval us   fold  scale')
    for channels, kernel, groups, sizes in SHAPES:
        for size in sizes:
            share = BATCH * size**2 * groups / (channels * kernel**2)
            times = measure(channels, kernel, groups, size,
                            getattr(torch, args.dtype), not args.no_gradient,
                            args.rounds)
            stock = quartiles(t['Eval'] for t in times)[1]
            fold, scale = (quartiles(t[plan] / t['Eval'] for t in times)[1]
                           for plan in ('fold', 'scale'))
            print(f'{channels:8} {kernel:6} {groups:6} {size:4} {share:11.3f} '
                  f'{stock * 1e6:8.0f} {fold:6.2f} {scale:6.2f}', flush=True)


if __name__ == '__main__':
    main()
