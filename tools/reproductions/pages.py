"""What the pages of the reproductions share: tables, text, progress."""
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress
from scipy.stats import ttest_rel

Item = TypeVar('Item')
# How sure an interval is that holds the true mean difference.
CONFIDENCE = 0.95


def table(titles: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Write a table.

    Args:
        titles (Sequence[object]): Of the columns.
        rows (Iterable[Sequence[object]]): Cells, shown as ``str`` does.

    Returns:
        str: In Markdown.
    """
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def paragraph(text: str) -> str:
    """Break a text into lines.

    Args:
        text (str): Without structure; white space is a space.

    Returns:
        str: Lines of at most 79 characters.
    """
    return textwrap.fill(
        ' '.join(text.split()),
        79,
        break_on_hyphens=False,
        break_long_words=False)


def mib(n_bytes: float) -> str:
    """Write a number of bytes in MiB.

    Args:
        n_bytes (float): Bytes.

    Returns:
        str: With one decimal, without the unit.
    """
    return f'{n_bytes / 2**20:.1f}'


def mean_spread(values: Sequence[float], digits: int = 3) -> str:
    """Write the mean of several runs, and how far they spread.

    Args:
        values (Sequence[float]): One a run.
        digits (int): Decimals. Defaults to 3.

    Returns:
        str: Mean and sample standard deviation; the value alone where there
        is one run.
    """
    mean = f'{statistics.mean(values):.{digits}f}'
    if len(values) == 1:
        return mean
    return f'{mean} ± {statistics.stdev(values):.{digits}f}'


def paired_difference(
        values: Sequence[float], others: Sequence[float]
) -> tuple[float, tuple[float, float] | None]:
    """Compare runs that go in pairs, such as those of a seed in two modes.

    Args:
        values (Sequence[float]): Of the ones.
        others (Sequence[float]): Of the others, in the same order.

    Returns:
        tuple[float, tuple[float, float] | None]: The mean difference, and
        the ends of its confidence interval (:data:`CONFIDENCE`), by the
        paired t-test; None where there is none: one pair, or all differences
        alike.
    """
    differences = [a - b for a, b in zip(values, others)]
    mean = statistics.mean(differences)
    if len(set(differences)) == 1:
        return mean, None
    interval = ttest_rel(values, others).confidence_interval(CONFIDENCE)
    return mean, (float(interval.low), float(interval.high))


def difference_text(mean: float, interval: tuple[float, float] | None) -> str:
    """Write down what :func:`paired_difference` returns.

    Args:
        mean (float): The mean difference.
        interval (tuple[float, float] | None): Around it.

    Returns:
        str: With three decimals and signs.
    """
    if interval is None:
        return f'{mean:+.3f}'
    low, high = interval
    return f'{mean:+.3f} ({low:+.3f} to {high:+.3f})'


def difference_verdict(interval: tuple[float, float] | None) -> str:
    """Say whether there is a difference.

    Args:
        interval (tuple[float, float] | None): From
            :func:`paired_difference`.

    Returns:
        str: To stand behind a comma.
    """
    if interval is None:
        return 'of which these runs cannot say how sure it is'
    if interval[0] <= 0 <= interval[1]:
        return ('which these runs cannot tell from none, nor from another '
                'difference in the interval')
    return f'which is more than chance explains, at {CONFIDENCE:.0%}'


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Show how far a loop is.

    Args:
        items (Sequence[Item]): What to loop over.
        what (str): What is being done.

    Yields:
        Item: Each of them.
    """
    with Progress() as progress:
        # A bar is drawn on terminals alone.
        silent = not progress.console.is_terminal
        task = progress.add_task(what, total=len(items))
        for done, item in enumerate(items):
            if silent:
                Console().print(f'{what}: {done}/{len(items)}')
            yield item
            progress.advance(task)
