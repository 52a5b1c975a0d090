import pytest
from reproductions import pages


def test_table():
    assert pages.table(('a', 'b'), [(1, 'x'), (2.5, None)]).split('\n') == [
        '| a | b |', '| --- | --- |', '| 1 | x |', '| 2.5 | None |'
    ]


def test_paragraph_keeps_long_words():
    link = '[x](' + 'y' * 90 + ')'
    lines = pages.paragraph(f'one\n   two {"word " * 30} {link}').split('\n')
    assert lines[0].startswith('one two word')
    assert lines[-1] == link
    assert all(len(line) <= 79 for line in lines[:-1])


@pytest.mark.parametrize('n_bytes, expected', [(0, '0.0'), (2**20, '1.0'),
                                               (1.25 * 2**20, '1.2')])
def test_mib(n_bytes, expected):
    assert pages.mib(n_bytes) == expected


@pytest.mark.parametrize('values, expected', [
    ([1.], '1.000'),
    ([1., 3.], '2.000 ± 1.414'),
])
def test_mean_spread(values, expected):
    assert pages.mean_spread(values) == expected


def test_track_shows_progress_without_a_terminal(capsys):
    assert list(pages.track('ab', 'Count')) == ['a', 'b']
    shown = capsys.readouterr().out
    assert 'Count: 0/2' in shown and 'Count: 1/2' in shown


@pytest.mark.parametrize('values, others, text, verdict', [
    # Mean -3, standard error 1 / sqrt(3), t(2) = 4.3027.
    ([1, 2, 3], [5, 5, 5], '-3.000 (-5.484 to -0.516)', 'more than chance'),
    ([4, 5, 6], [5, 5, 5], '+0.000 (-2.484 to +2.484)', 'cannot tell'),
    ([1], [2], '-1.000', 'cannot say'),
    ([1, 2], [2, 3], '-1.000', 'cannot say'),
])
def test_paired_difference(values, others, text, verdict):
    mean, interval = pages.paired_difference(values, others)
    assert pages.difference_text(mean, interval) == text
    assert verdict in pages.difference_verdict(interval)
