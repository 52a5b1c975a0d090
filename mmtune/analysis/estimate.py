"""Foretell the memory of a step at a batch that no run here could hold.

Feature maps grow with the batch and parameters do not, so that the peak of a
step is affine in the batch. Not quite from the first image on: with few of
them the peak may lie elsewhere, in the backward of a large linear layer or in
the optimizer. The runs themselves say whether that is so.
"""
import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import linear_regression

__all__ = ['AffineMemory', 'fit_affine']

# Of the largest measured figure; runs that stray further are not on a line.
TOLERANCE = .01


@dataclass(frozen=True)
class AffineMemory:
    """Bytes as ``fixed + per_image * batch``, by least squares.

    Attributes:
        per_image (float): Bytes that an image adds.
        fixed (float): Bytes whatever the batch is.
        residual (float): Bytes by which the farthest run is off the line.
        batches (tuple[int, ...]): Of the runs, in ascending order.
        n_bytes (tuple[int, ...]): What they took.
    """

    per_image: float
    fixed: float
    residual: float
    batches: tuple[int, ...]
    n_bytes: tuple[int, ...]

    @property
    def is_affine(self) -> bool:
        """Whether every run is within a hundredth of the largest."""
        return self.residual <= TOLERANCE * max(self.n_bytes)

    def at(self, batch: int) -> float:
        """Read the line.

        Args:
            batch (int): How many images.

        Returns:
            float: Bytes.
        """
        return self.fixed + self.per_image * batch

    def error(self, batch: int) -> float:
        """Tell how sure :meth:`at` is.

        Each pair of runs has a line of its own. The error is how far the
        farthest of them comes out from the fitted one: bytes to either side.
        It is no confidence interval: it says how much it matters which runs
        were made.

        Args:
            batch (int): How many images.

        Returns:
            float: Bytes.
        """
        runs = zip(self.batches, self.n_bytes)
        return max(
            abs(_extrapolate(*pair, batch) - self.at(batch))
            for pair in combinations(runs, 2))

    def largest_batch(self, limit: float) -> int:
        """Find how many images fit, the error counted against them.

        Args:
            limit (float): Bytes that there are.

        Returns:
            int: The batch; 0 where not even one image fits.

        Raises:
            ValueError: If the runs took no more for more images.
        """
        if self.per_image <= 0:
            raise ValueError(
                'runs must take more for more images, but took '
                f'{self.n_bytes} bytes for {self.batches}; fit runs with '
                'larger batches or images')
        most = max(0, int((limit - self.fixed) / self.per_image)) + 1
        return bisect.bisect_right(
            range(1, most + 1),
            limit,
            key=lambda batch: self.at(batch) + self.error(batch))


def fit_affine(batches: Sequence[int],
               n_bytes: Sequence[int]) -> AffineMemory:
    """Fit the memory of a step over the batch.

    Example:
        >>> memory = fit_affine([1, 2, 3], [150, 250, 350])
        >>> memory.at(16), memory.error(16)
        (1650.0, 0.0)

    Args:
        batches (Sequence[int]): How many images the runs had: at least three
            different numbers, since any two are on a line.
        n_bytes (Sequence[int]): What each of the runs took.

    Returns:
        AffineMemory: The line.

    Raises:
        ValueError: If the batches are fewer, repeated, or not positive, or
            the two differ in length.
    """
    if len(batches) != len(n_bytes):
        raise ValueError('`n_bytes` must have a figure for each of '
                         f'{len(batches)} batches, but has {len(n_bytes)}')
    if len({*batches}) < max(3, len(batches)) or min(batches) < 1:
        raise ValueError('`batches` must be three or more different positive '
                         'numbers, since any two runs are on a line, but got '
                         f'{list(batches)}')
    batches, n_bytes = zip(*sorted(zip(batches, n_bytes)))
    per_image, fixed = linear_regression(batches, n_bytes)
    residual = max(
        abs(fixed + per_image * batch - measured)
        for batch, measured in zip(batches, n_bytes))
    return AffineMemory(per_image, fixed, residual, batches, n_bytes)


def _extrapolate(first: tuple[int, int], second: tuple[int, int],
                 batch: int) -> float:
    (start, low), (end, high) = first, second
    return low + (high - low) / (end - start) * (batch - start)
