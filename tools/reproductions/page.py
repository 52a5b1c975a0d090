"""What a page is, how it is filled, and how figures are written."""
import functools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from mmtune.analysis.timing import quartiles

Item = TypeVar('Item')
# How sure an interval is that holds the true mean difference.
CONFIDENCE = 0.95
MIB = 2**20


@dataclass(frozen=True)
class Page:
    """What is measured for a page, and what is made of it.

    Attributes:
        run (Callable): Measures, and returns plain data.
        figures (Callable): Writes from that the text of each place of the
            page; see :func:`fill`.
        claims (Callable): Tells from it which sentences of the page's prose
            hold.
        plot (Callable): Draws it into a file; see :func:`drawing`.
    """

    run: Callable[..., dict]
    figures: Callable[[dict], dict[str, object]]
    claims: Callable[[dict], dict[str, bool]]
    plot: Callable[[dict, Path], None]

    def write(self, text: str, record: Mapping[str, Any]) -> str:
        """Fill the Markdown of a page with a record of tools/reproduce.py."""
        found = record['found']
        return fill(text, {
            **self.figures(found), 'doubts': doubts(self.claims(found)),
            'origin': origin(record)
        })


def drawing(height: float) -> Callable:
    """Make of what draws on a figure, so many inches high, what writes one."""

    def decorate(draw: Callable[[dict, Figure], None]
                 ) -> Callable[[dict, Path], None]:

        @functools.wraps(draw)
        def plot(found: dict, path: Path) -> None:
            figure = Figure(figsize=(8, height), layout='constrained')
            draw(found, figure)
            figure.savefig(path, dpi=120)

        return plot

    return decorate


# Inside of a line `<!--NAME-->...<!--/-->`; around lines `<!-- NAME -->` and
# `<!-- end of NAME -->`.
PLACE = re.compile(
    r'<!--(?P<word>[\w-]+)-->.*?<!--/-->|'
    r'<!-- (?P<lines>[\w-]+) -->\n.*?<!-- end of (?P=lines) -->', re.DOTALL)


def fill(text: str, values: Mapping[str, object]) -> str:
    """Put values, by their names, into the places of a page.

    Raises:
        ValueError: If a place has no value, or a value no place.
    """
    places = {match[1] or match[2] for match in PLACE.finditer(text)}
    if places != values.keys():
        raise ValueError(
            'the places of a page must be those that its module fills, but '
            f'only one of them has {sorted(places ^ values.keys())}')

    def write(match: re.Match) -> str:
        if match['word']:
            return f'<!--{match["word"]}-->{values[match["word"]]}<!--/-->'
        name = match['lines']
        body = f'{values[name]}\n\n' if values[name] else ''
        return f'<!-- {name} -->\n\n{body}<!-- end of {name} -->'

    return PLACE.sub(write, text)


def without_places(text: str) -> str:
    """Leave out of a text what marks its places."""
    return re.sub(r'<!--.*?-->', '', text)


def doubts(claims: Mapping[str, bool]) -> str:
    """Name what a page says and the figures do not, if there is anything."""
    wrong = [f'- {claim}' for claim, holds in claims.items() if not holds]
    if not wrong:
        return ''
    return '\n'.join([
        '**The text was written for other figures. These do not show that:**',
        '', *wrong
    ])


def origin(record: Mapping[str, Any]) -> str:
    """Tell how and where something was measured."""
    return (f'`{record["command"]}`, {duration(record["seconds"])} on '
            f'{record["cpu"]} ({record["cores"]} cores), on the '
            f'{record["device"]}; torch {record["torch"]}, mmtune '
            f'{record["mmtune"]}, commit {record["commit"] or "unknown"}.')


def duration(seconds: int) -> str:
    """Write whole seconds, such as ``'3 min 20 s'``."""
    minutes, rest = divmod(seconds, 60)
    return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def table(rows: Iterable[Item],
          columns: Mapping[str, Callable[[Item], object]]) -> str:
    """Write a table in Markdown.

    Args:
        rows (Iterable): What each row is about.
        columns (Mapping[str, Callable]): By its title, what gives the cell
            of a row.
    """
    lines: list[Iterable[object]] = [columns, ['---'] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def cell(spec: str, *keys: object) -> Callable[[Any], str]:
    """Make what formats a value of a row: ``row[keys[0]][keys[1]]...``."""
    return lambda row: format(functools.reduce(getitem, keys, row), spec)


def sheet(corner: str, columns: Mapping[str, Item],
          rows: Mapping[str, Callable[[Item], object]]) -> str:
    """Write a :func:`table` turned around: a column for each thing.

    Args:
        corner (str): What stands above the titles of the rows.
        columns (Mapping): What each column is about, by its title.
        rows (Mapping[str, Callable]): By its title, what gives the cell of a
            column.
    """
    return table(rows, {
        corner: str,
        **{title: lambda row, item=item: rows[row](item)
           for title, item in columns.items()}
    })


def by(key: str, rows: Iterable[dict]) -> dict[Any, list[dict]]:
    """Group rows by one of their values."""
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def mib(n_bytes: float) -> str:
    """Write bytes in MiB, with one decimal and without the unit."""
    return f'{n_bytes / MIB:.1f}'


def shape_text(batch: int, *size: int) -> str:
    """Write the shape of a batch of images of a height and a width."""
    return ' x '.join(map(str, (batch, 3, *size)))


def span(values: Iterable[float | None], spec: str = '.2g') -> str:
    """Write from where to where numbers go, None left out."""
    known = [value for value in values if value is not None]
    if not known:
        return 'none'
    return ' to '.join(
        dict.fromkeys(format(end, spec) for end in (min(known), max(known))))


def quartiles_text(values: Iterable[float], digits: int = 3) -> str:
    """Write the median, and the quartiles around it in brackets."""
    low, median, high = (f'{x:.{digits}f}' for x in quartiles(values))
    return f'{median} ({low}-{high})'


def each_mode(steps: Iterable[dict]) -> list[tuple[dict, str]]:
    """List steps with each mode in which they were measured."""
    return [(step, mode) for step in steps for mode in step['peak']]


def ratios_to_train(step: dict, mode: str) -> list[float]:
    """The time of a step as a multiple of Train's, round by round."""
    seconds = step['seconds']
    return [a / b for a, b in zip(seconds[mode], seconds['Train'])]


# Of tables of what :func:`each_mode` lists.
STEP_COLUMNS: dict[str, Callable[[tuple[dict, str]], str]] = {
    'mode': cell('', 1),
    'peak, MiB': lambda it: mib(it[0]['peak'][it[1]]),
    'to Train': lambda it:
    f'{it[0]["peak"][it[1]] / it[0]["peak"]["Train"] - 1:+.1%}',
    'time, Train = 1': lambda it: quartiles_text(ratios_to_train(*it))
}


def mean_spread(values: Sequence[float], digits: int = 3) -> str:
    """Write the mean of runs and, of several, their standard deviation."""
    mean = f'{statistics.mean(values):.{digits}f}'
    if len(values) == 1:
        return mean
    return f'{mean} ± {statistics.stdev(values):.{digits}f}'


@dataclass(frozen=True)
class Difference:
    """How runs differ from others that they go in pairs with.

    Attributes:
        mean (float): The mean difference.
        interval (tuple[float, float] | None): The ends of its confidence
            interval (:data:`CONFIDENCE`), by the paired t-test; None where
            there is none: one pair, or all differences alike.
    """

    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float],
           others: Sequence[float]) -> 'Difference':
        """Compare runs, such as those of each seed in two modes."""
        differences = [a - b for a, b in zip(values, others)]
        mean = statistics.mean(differences)
        if len(set(differences)) == 1:
            return cls(mean, None)
        interval = ttest_rel(values, others).confidence_interval(CONFIDENCE)
        return cls(mean, (float(interval.low), float(interval.high)))

    @property
    def is_certain(self) -> bool:
        """Whether it is more than chance explains."""
        return self.interval is not None and (
            self.interval[0] > 0 or self.interval[1] < 0)

    def __str__(self) -> str:
        if self.interval is None:
            return f'{self.mean:+.3f}'
        return '{:+.3f} ({:+.3f} to {:+.3f})'.format(self.mean, *self.interval)
