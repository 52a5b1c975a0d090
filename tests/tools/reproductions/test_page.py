import pytest
from reproductions import page

TEXT = """\
# Title

<!-- rows -->

<!-- end of rows -->

Of <!--count-->3<!--/--> runs, <!--share-->old<!--/--> fail.
"""


def test_places_are_filled_and_filled_again():
    values = dict(rows='| a |', count=7, share='50%')
    once = page.fill(TEXT, values)
    assert once == """\
# Title

<!-- rows -->

| a |

<!-- end of rows -->

Of <!--count-->7<!--/--> runs, <!--share-->50%<!--/--> fail.
"""
    assert page.fill(once, values) == once
    assert page.without_places(once).endswith('Of 7 runs, 50% fail.\n')
    assert page.fill(once, dict(values, rows='')).count('\n') == 7


@pytest.mark.parametrize('values, name', [
    (dict(rows='', count=1), 'share'),
    (dict(rows='', count=1, share=2, more=3), 'more'),
])
def test_places_that_do_not_fit_are_refused(values, name):
    with pytest.raises(ValueError, match=name):
        page.fill(TEXT, values)


def test_what_figures_do_not_bear_out_is_named():
    assert page.doubts({'a is b': True}) == ''
    assert page.doubts({'a is b': True, 'b is c': False}).endswith(
        'These do not show that:**\n\n- b is c')


def test_table():
    assert page.table([(1, 'x'), (2.5, None)], {
        'a': lambda row: row[0],
        'b': lambda row: row[1]
    }).split('\n') == [
        '| a | b |', '| --- | --- |', '| 1 | x |', '| 2.5 | None |'
    ]


def test_sheet():
    assert page.sheet('of', dict(one=1, two=2), {
        'half': lambda x: x / 2,
        'square': lambda x: x**2
    }).split('\n') == [
        '| of | one | two |', '| --- | --- | --- |',
        '| half | 0.5 | 1.0 |', '| square | 1 | 4 |'
    ]


@pytest.mark.parametrize('values, expected', [
    ([1, 3, 2], '1 to 3'), ([2], '2'), ([1.001, 1.002], '1'),
    ([None, 4], '4'), ([None], 'none'), ([], 'none'),
])
def test_span(values, expected):
    assert page.span(values) == expected


@pytest.mark.parametrize('seconds, expected', [(0, '0 s'), (59, '59 s'),
                                               (60, '1 min 0 s'),
                                               (3725, '62 min 5 s')])
def test_duration(seconds, expected):
    assert page.duration(seconds) == expected


@pytest.mark.parametrize('n_bytes, expected', [(0, '0.0'), (2**20, '1.0'),
                                               (1.25 * 2**20, '1.2')])
def test_mib(n_bytes, expected):
    assert page.mib(n_bytes) == expected


@pytest.mark.parametrize('values, expected', [
    ([1.], '1.000'),
    ([1., 3.], '2.000 ± 1.414'),
])
def test_mean_spread(values, expected):
    assert page.mean_spread(values) == expected


@pytest.mark.parametrize('values, others, text, certain', [
    # Mean -3, standard error 1 / sqrt(3), t(2) = 4.3027.
    ([1, 2, 3], [5, 5, 5], '-3.000 (-5.484 to -0.516)', True),
    ([4, 5, 6], [5, 5, 5], '+0.000 (-2.484 to +2.484)', False),
    ([1], [2], '-1.000', False),
    ([1, 2], [2, 3], '-1.000', False),
])
def test_difference(values, others, text, certain):
    difference = page.Difference.of(values, others)
    assert str(difference) == text
    assert difference.is_certain == certain
