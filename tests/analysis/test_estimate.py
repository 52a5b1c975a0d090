"""The line through the memory of a few small batches."""
import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmtune.analysis.estimate import fit_affine

MIB = 2**20


@given(st.integers(1, 10**9), st.integers(0, 10**10),
       st.sets(st.integers(1, 32), min_size=3, max_size=5))
def test_what_is_affine_is_foretold(per_image, fixed, batches):
    batches = sorted(batches)
    memory = fit_affine(batches, [fixed + per_image * n for n in batches])
    assert memory.is_affine
    assert memory.residual == pytest.approx(0, abs=1e-3)
    for batch in (0, 1, 100):
        # Absolute too: nothing but 0 is near to 0 bytes by a share of them.
        assert memory.at(batch) == pytest.approx(
            fixed + per_image * batch, abs=1e-3)
        assert memory.error(batch) == pytest.approx(0, abs=1e-3)


def test_a_run_off_the_line():
    memory = fit_affine([1, 2, 3], [100, 230, 300])
    # Least squares by hand: means 2 and 210, slope (300 - 100) / 2.
    assert memory.per_image == 100 and memory.fixed == 10
    assert memory.residual == 20
    assert not memory.is_affine
    # The pairs come to 100 + 130 * 9, 100 + 100 * 9 and 230 + 70 * 8, the
    # line to 1010.
    assert memory.at(10) == 1010
    assert memory.error(10) == pytest.approx(1270 - 1010)


def test_the_order_of_the_runs_does_not_matter():
    runs = [(1, 100), (2, 230), (4, 300)]
    found = {
        fit_affine(*zip(*order))
        for order in itertools.permutations(runs)
    }
    assert len(found) == 1
    assert found.pop().batches == (1, 2, 4)


def test_a_peak_that_lies_elsewhere_at_small_batches():

    def peak(batch):
        return max(600 * MIB + 10 * MIB * batch, 300 * MIB * batch)

    small = fit_affine([1, 2, 3], list(map(peak, [1, 2, 3])))
    assert not small.is_affine
    assert small.at(16) < peak(16)
    large = fit_affine([3, 4, 5], list(map(peak, [3, 4, 5])))
    assert large.is_affine
    assert large.at(16) == pytest.approx(peak(16))


@given(st.lists(st.integers(0, 25), min_size=3, max_size=3),
       st.integers(0, 10**4))
def test_the_largest_batch_is_that_of_a_search(noise, limit):
    runs = [50 + 100 * batch + noise[batch - 1] for batch in (1, 2, 3)]
    memory = fit_affine([1, 2, 3], runs)
    fitting = [
        batch for batch in range(1, 200)
        if memory.at(batch) + memory.error(batch) <= limit
    ]
    assert memory.largest_batch(limit) == len(fitting)
    assert fitting == list(range(1, len(fitting) + 1))


@given(st.lists(st.integers(0, 10**4), min_size=3, max_size=3),
       st.integers(0, 10**5))
def test_the_largest_batch_fits_however_runs_stray(n_bytes, limit):
    memory = fit_affine([1, 2, 3], n_bytes)
    assume(memory.per_image > 0)
    largest = memory.largest_batch(limit)
    if largest:
        assert memory.at(largest) + memory.error(largest) <= limit


@pytest.mark.parametrize('limit, largest', [(0, 0), (149, 0), (150, 1),
                                            (1649, 15), (1650, 16)])
def test_the_largest_batch(limit, largest):
    memory = fit_affine([1, 2, 3], [150, 250, 350])
    assert memory.largest_batch(limit) == largest


@pytest.mark.parametrize('n_bytes', [[5, 5, 5], [7, 6, 5]])
def test_no_largest_batch_where_images_take_nothing(n_bytes):
    memory = fit_affine([1, 2, 3], n_bytes)
    with pytest.raises(ValueError, match='more for more images.*larger'):
        memory.largest_batch(100)


@pytest.mark.parametrize('batches, n_bytes, message', [
    ([1, 2], [1, 2], r'three or more different.*\[1, 2\]'),
    ([], [], r'three or more different.*\[\]'),
    ([1, 2, 2], [1, 2, 2], r'three or more different.*\[1, 2, 2\]'),
    ([1, 2, 3, 3], [1, 2, 3, 3], 'three or more different'),
    ([0, 1, 2], [1, 2, 3], 'positive'),
    ([1, 2, 3], [1, 2], 'each of 3 batches, but has 2'),
])
def test_runs_that_give_no_line(batches, n_bytes, message):
    with pytest.raises(ValueError, match=message):
        fit_affine(batches, n_bytes)
