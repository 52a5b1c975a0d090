"""Tensors on which a frozen normalization is tried."""
import torch
from torch import Tensor

__all__ = ['SHAPES', 'VARIANCES', 'Case']

# Of the inputs that are tried, without their channels.
SHAPES = ((2, 3, 2), (1, 1, 1), (3, 1, 4))
# Negative and zero too: a forward may clamp.
VARIANCES = (0., 1., 1e-30, -.5, 1e-8, .3, 1e-5)


class Case:
    """Tensors to try, and what the formula makes of them.

    Args:
        channels (int): Of the normalization.
        number (int): A channel meets another variance in each.
        eps (float): Added to the variance.
        generator (torch.Generator): Of the CPU.
    """

    def __init__(self, channels: int, number: int, eps: float,
                 generator: torch.Generator) -> None:

        def random(*shape: int) -> Tensor:
            # Not near zero, where an error would be small.
            values = torch.rand(
                shape, generator=generator, dtype=torch.float64, device='cpu')
            values = values.mul_(2).sub_(1)
            return values + values.sign() / 2

        variances = torch.tensor(
            VARIANCES, dtype=torch.float64, device='cpu')
        every = torch.arange(channels, device='cpu')
        weight, bias, mean = random(3, channels)
        var = variances[(every + number) % len(VARIANCES)]
        batch, *sizes = SHAPES[number % len(SHAPES)]
        self.x = x = random(batch, channels, *sizes)
        self.buffers = (weight, bias, mean, var)
        scale, bias, mean = (
            t.view(1, -1, 1, 1)
            for t in (weight * (var + eps).rsqrt(), bias, mean))
        self.factor = random(*x.shape)
        self.output = (x - mean) * scale + bias
        self.gradient = self.factor * scale
        # How large the numbers are that the forward may have added.
        self.size = (x.abs() + mean.abs()) * scale.abs() + bias.abs()

    def is_computed(self, result: tuple[Tensor, Tensor] | None) -> bool:
        """Whether output and gradient are those of the formula."""
        if result is None:
            return False
        x, output = result
        if not _close(output.detach(), self.output, self.size):
            return False
        if not x.requires_grad:
            return True
        gradient, = torch.autograd.grad(output, x, self.factor)
        return _close(gradient, self.gradient, self.gradient.abs())


def _close(actual: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Equal where finite; infinite or no number in the same places."""
    finite = expected.isfinite()
    # By which way an infinite scale gives which of the two is rounding.
    near = (actual - expected).abs() <= 1e-10 * size
    return torch.equal(actual.isfinite(), finite) and bool(
        (near | ~finite).all())
