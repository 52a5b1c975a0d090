"""Write what was found down as Markdown."""
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmtune.analysis.device.exactness import BOUND, Check

__all__ = ['blocks_section', 'detector_section', 'exactness_section',
           'head', 'operators_section']

MIB = 2**20


def head(about: Mapping[str, Any]) -> str:
    """Say what ran where.

    Args:
        about (Mapping[str, Any]): ``device``, ``cpu``, ``command``,
            ``commit``, ``threads`` and ``env``.

    Returns:
        str: The title and a list.
    """
    on = about['device']
    where = 'no GPU was used' if on == 'CPU' else 'a GPU'
    # MMEngine has an answer of a page.
    env = '\n'.join(f'- {name}: {value}'
                    for name, value in about['env'].items()
                    if '\n' not in value)
    return (f'# Tune mode on: {on}\n\n'
            f'`{about["command"]}` ran on {on} ({where}); host: '
            f'{about["cpu"]}, {about["threads"]} threads; commit: '
            f'{about["commit"] or "not known"}.\n\n{env}\n')


def exactness_section(checks: Sequence[Check], left_out: str) -> str:
    """Write down how exact blocks are.

    Args:
        checks (Sequence[Check]): At least one.
        left_out (str): What was not checked, and why; else empty.

    Returns:
        str: Two tables, and a line for each check that failed.
    """
    failed = [check for check in checks if not check.passed]
    verdict = f'{len(failed)} of {len(checks)} checks FAILED' if failed else (
        f'All {len(checks)} checks passed')
    lines = [
        '## Exactness', '',
        "The worst error of the output and of all gradients, in units of "
        "Eval's own (root of the mean squares, against the stock modules in "
        'float64 on the CPU); in float64, in units of 1e-10 of the value. At '
        f'most {BOUND} passes; "-": the stock modules do not run so here. '
        f'{verdict}. {left_out}'.strip(), '',
        _worst_table('way', 'way', checks),
        _worst_table('block (worst of all ways)', 'kind', checks)
    ]
    lines += [
        f'- FAILED: {c.kind}; {c.precision}; {c.way}: {c.worst[0]}, '
        f'{c.worst[1]:.3g}' for c in failed
    ]
    return '\n'.join(lines) + '\n' * bool(failed)


def _worst_table(title: str, by: str, checks: Sequence[Check]) -> str:
    columns = list(dict.fromkeys(check.precision for check in checks))
    rows = []
    for name in dict.fromkeys(getattr(check, by) for check in checks):
        row = [name]
        for column in columns:
            own = [check for check in checks
                   if getattr(check, by) == name and check.precision == column]
            row.append(_worst(own))
        rows.append(row)
    return _table([title, *columns], rows)


def _worst(checks: Sequence[Check]) -> str:
    if not checks:
        return '-'
    # Those that failed, with NaN among them, come first.
    worst = max(checks, key=lambda check: (not check.passed, check.worst[1]))
    return f'{worst.worst[1]:.2g}{"" if worst.passed else " FAILED"}'


def blocks_section(title: str, rows: Iterable[dict[str, Any]]) -> str:
    """Write down what blocks cost.

    Args:
        title (str): Says the precision.
        rows (Iterable[dict[str, Any]]): Each with ``channels``, ``kernel``,
            ``height``, ``width``, and ``ways`` as
            :func:`mmtune.analysis.device.blocks.measure_blocks` gives them.

    Returns:
        str: A table of times and one of bytes.
    """
    rows = list(rows)
    ways = list(rows[0]['ways'])
    shape = ['kernel', 'channels', 'map']
    times, kept = [], []
    for row in rows:
        cells = [f'{row["kernel"]} x {row["kernel"]}', row['channels'],
                 f'{row["height"]} x {row["width"]}']
        found = row['ways']
        times.append([
            *cells, f'{found["Eval"]["seconds"] * 1e6:.1f}',
            *(_ratio(found[way]) + _small(found[way]) for way in ways[1:])
        ])
        kept.append([*cells, *(f'{found[way]["kept"] / MIB:.3f}'
                               for way in ways)])
    return '\n'.join([
        f'## {title}', '',
        'Forward and backward of 8 blocks in a row, batch 2: the share of '
        "one. Eval's in microseconds; the others in units of Eval's, median "
        'and quartiles of interleaved rounds. "small": ran as stock.', '',
        _table([*shape, 'Eval, us', *ways[1:]], times),
        'MiB kept for backward, a block:', '', _table([*shape, *ways], kept)
    ])


def operators_section(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Write down how many operators a block takes.

    Args:
        found (Mapping[str, Mapping[str, Any]]): By way, from
            :func:`mmtune.analysis.device.blocks.count_operators`.

    Returns:
        str: A table.
    """
    rows = [[way, row['forward'], row['backward'],
             row['forward'] + row['backward'],
             '-' if row['kernels'] is None else row['kernels']]
            for way, row in found.items()]
    return '\n'.join([
        '## Operators a block', '',
        'Of PyTorch, views aside, where no kernel of the native node for a '
        'CPU serves; and kernels that a GPU was given.', '',
        _table(['way', 'forward', 'backward', 'both', 'kernels'], rows)
    ])


def detector_section(title: str, found: Mapping[str, Mapping]) -> str:
    """Write down what a training step of a detector takes.

    Args:
        title (str): Says the detector, the shape and the precision.
        found (Mapping[str, Mapping]): By way, from
            :func:`mmtune.analysis.device.detectors.measure_detector`.

    Returns:
        str: A table.
    """
    columns = ['way', 'kept MiB', 'peak MiB', 'peak / Eval', 'seconds',
               'time / Eval', 'gradient off Eval', 'blocks']
    peak = found['Eval'].get('peak')
    rows = []
    for way, row in found.items():
        if 'failed' in row:
            rows.append([way, row['failed'], *['-'] * 6])
            continue
        off = row['off_eval']
        rows.append([
            way, f'{row["kept"] / MIB:.1f}', f'{row["peak"] / MIB:.1f}',
            f'{row["peak"] / peak:.3f}' if peak else '-',
            f'{row["seconds"]:.4g}', _ratio(row),
            '-' if off is None else f'{off:.1e}',
            ', '.join(f'{n} {how}' for how, n in row['ran'].items()) or '-'
        ])
    return '\n'.join([f'## {title}', '', _table(columns, rows)])


def _ratio(row: Mapping[str, Any]) -> str:
    if 'ratio' not in row:
        return '-'
    low, high = row['ratio_quartiles']
    return f'{row["ratio"]:.3f} ({low:.3f}-{high:.3f})'


def _small(row: Mapping[str, Any]) -> str:
    return ' small' if 'small' in row['ran'] else ''


def _table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |'
                     for line in lines) + '\n'
