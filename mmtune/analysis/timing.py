"""Time several ways of doing the same, side by side."""
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

__all__ = ['interleaved_seconds', 'quartiles']


def interleaved_seconds(calls: Mapping[str, Callable[[], Any]],
                        rounds: int,
                        warm_up: int = 2,
                        at_least: float = 0.,
                        seed: int = 0) -> Iterator[dict[str, float]]:
    """Time calls in rounds, each call once a round, in shuffled order.

    Whatever else the machine does then slows all of them alike, and the
    ratio of two calls in one round says more than that of their medians.

    Example:
        >>> rounds = list(interleaved_seconds({'a': a, 'b': b}, 20))
        >>> quartiles(r['a'] / r['b'] for r in rounds)

    Args:
        calls (Mapping[str, Callable]): What to time, by name.
        rounds (int): How many rounds to time.
        warm_up (int): How many rounds to run before; at least one.
            Defaults to 2.
        at_least (float): Seconds that the slowest call, by the last round
            before, should take: where it is shorter, all calls are repeated
            equally often. Defaults to 0, never.
        seed (int): Of the shuffled order. Defaults to 0.

    Yields:
        dict[str, float]: For a round, the seconds of each call (the mean of
        its repetitions), in the order of ``calls``.
    """
    shuffler = random.Random(seed)
    order = list(calls)

    def run_round(repeats: int) -> dict[str, float]:
        shuffler.shuffle(order)
        seconds = {name: _seconds(calls[name], repeats) for name in order}
        return {name: seconds[name] for name in calls}

    for _ in range(max(1, warm_up)):
        slowest = max(run_round(1).values())
    repeats = max(1, math.ceil(at_least / slowest))
    for _ in range(rounds):
        yield run_round(repeats)


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Give the lower quartile, the median and the upper quartile.

    Args:
        values (Iterable[float]): At least one.

    Returns:
        tuple[float, float, float]: Interpolated linearly between values.
    """
    at = torch.tensor([.25, .5, .75], dtype=torch.float64)
    low, median, high = torch.tensor(
        list(values), dtype=torch.float64).quantile(at).tolist()
    return low, median, high


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    """Let the device finish what it was given."""
    # Else it would get a context of its own, for nothing.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
