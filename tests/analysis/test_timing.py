import pytest
import torch

from mmtune.analysis import timing
from mmtune.analysis.timing import interleaved_seconds, quartiles


class Clock:
    """Time that passes only in the calls that are timed."""

    def __init__(self, monkeypatch):
        self.now = 0.
        self.order = []
        monkeypatch.setattr(timing.time, 'perf_counter', lambda: self.now)

    def call(self, name, seconds):

        def run():
            self.order.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def calls(clock, **seconds):
    return {name: clock.call(name, value) for name, value in seconds.items()}


def test_each_call_once_a_round(clock):
    rounds = list(interleaved_seconds(calls(clock, a=1, b=2, c=4), 5))
    assert rounds == [dict(a=1, b=2, c=4)] * 5
    assert all(list(seconds) == ['a', 'b', 'c'] for seconds in rounds)
    assert len(clock.order) == 3 * (2 + 5)
    in_rounds = [clock.order[i:i + 3] for i in range(0, len(clock.order), 3)]
    assert all(sorted(order) == ['a', 'b', 'c'] for order in in_rounds)
    assert len(set(map(tuple, in_rounds))) > 1


def test_the_order_follows_the_seed(clock):

    def order(seed):
        clock.order.clear()
        list(interleaved_seconds(calls(clock, a=1, b=1, c=1), 9, seed=seed))
        return clock.order.copy()

    assert order(1) == order(1) != order(2)


def test_warm_up_is_dropped(clock):
    durations = iter([100, 50, 25, 1, 2])

    def slow_at_first():
        clock.now += next(durations)

    rounds = interleaved_seconds({'a': slow_at_first}, 2, warm_up=3)
    assert list(rounds) == [{'a': 1}, {'a': 2}]


@pytest.mark.parametrize('at_least, repeats', [(0, 1), (4, 1), (5, 2),
                                               (40, 10)])
def test_short_calls_are_repeated_alike(clock, at_least, repeats):
    rounds = list(
        interleaved_seconds(
            calls(clock, a=1, b=4), 1, warm_up=1, at_least=at_least))
    assert rounds == [dict(a=1, b=4)]
    assert clock.order[2:].count('a') == repeats
    assert clock.order[2:].count('b') == repeats


@pytest.mark.parametrize('values, expected', [
    ([3], (3, 3, 3)),
    ([2, 1], (1.25, 1.5, 1.75)),
    ([5, 1, 4, 2, 3], (2, 3, 4)),
    (iter([1, 2, 3, 4]), (1.75, 2.5, 3.25)),
])
def test_quartiles(values, expected):
    assert quartiles(values) == pytest.approx(expected)


def test_quartiles_of_nothing_raise():
    with pytest.raises(RuntimeError):
        quartiles([])


@pytest.mark.parametrize('is_initialized, expected', [
    (False, ['call', 'call']),
    (True, ['wait', 'call', 'wait', 'wait', 'call', 'wait']),
])
def test_a_gpu_is_waited_for_before_and_after(monkeypatch, is_initialized,
                                              expected):
    done = []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: done.append('wait'))
    list(interleaved_seconds({'a': lambda: done.append('call')}, 1, 1))
    assert done == expected
