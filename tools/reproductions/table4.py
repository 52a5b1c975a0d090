"""The paper's Table 4: whether a step here saves what it saves there."""
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from matplotlib.figure import Figure

from mmtune.analysis.estimate import AffineMemory, fit_affine
from reproductions.material import total
from reproductions.page import MIB, Page, by, cell, drawing, mib, span, table
from reproductions.table4_steps import MODES, SUSPECT, run

NAMES = dict(MMEngine="MMEngine's rewrite", Tune='mmtune')
# A saving counts as reproduced where it differs by no more than this share.
TOLERANCE = 0.05


def paper_saving(row: dict) -> float:
    """Read the bytes saved in the paper: GB as logged are MiB / 1000."""
    before, after = row['gb']
    return (before - after) * 1000 * MIB


def fit(row: dict, value: Callable[[dict], int]) -> AffineMemory:
    """Fit a line to what a row's steps at three batches or more take."""
    return fit_affine([int(batch) for batch in row['steps']],
                      list(map(value, row['steps'].values())))


def saved_by(mode: str) -> Callable[[dict], int]:
    """Give what tells the bytes that a mode saves at a batch."""
    return lambda steps: total(steps['Eval']) - total(steps[mode])


def at_batch(row: dict,
             value: Callable[[dict], int]) -> tuple[float, float | None]:
    """Tell bytes at a row's batch, and the error of what is extrapolated."""
    steps = row['steps'].get(str(row['batch']))
    if steps is not None:
        return value(steps), None
    line = fit(row, value)
    return line.at(row['batch']), line.error(row['batch'])


def saving(row: dict, mode: str) -> tuple[float, float | None]:
    """Tell what a mode saves at a row's batch."""
    return at_batch(row, saved_by(mode))


def eval_total(row: dict) -> float:
    """Tell what a step takes in Eval mode at a row's batch, in bytes."""
    return at_batch(row, lambda steps: total(steps['Eval']))[0]


def eval_gb(row: dict) -> float:
    """Tell what Eval takes, in the paper's GB."""
    return eval_total(row) / MIB / 1000


def ratio(row: dict, mode: str = 'MMEngine') -> float:
    """What is saved here, over what is saved in the paper."""
    return saving(row, mode)[0] / paper_saving(row)


def ratio_with_copy(row: dict) -> float:
    """Compare with the paper as if folded weights were kept in float32."""
    copies = 4 * row['weights']
    return (saving(row, 'MMEngine')[0] - copies) / paper_saving(row)


def over_mmengine(row: dict) -> float:
    """What mmtune saves, over what MMEngine's rewrite saves."""
    return saving(row, 'Tune')[0] / saving(row, 'MMEngine')[0]


def is_close(value: float) -> bool:
    """Tell whether a ratio is one, within the tolerance."""
    return abs(value - 1) <= TOLERANCE


def label(row: dict) -> str:
    """Name a row."""
    return Path(row['eval']).stem.replace('-1x_coco', '').replace(
        '_1x_coco', '')


def saved_text(row: dict, mode: str) -> str:
    """Write what a mode saves, and its share of what Eval takes."""
    saved, error = saving(row, mode)
    bar = '' if error is None else f' ± {error / MIB:.1f}'
    return f'{saved / MIB:.0f}{bar} ({saved / eval_total(row):.1%})'


def verdict(rows: Sequence[dict]) -> str:
    """Count the rows that come out as the paper has them."""
    parts = []
    for precision, group in by('precision', rows).items():
        ratios = list(map(ratio, group))
        parts.append(
            f'{sum(map(is_close, ratios))} of {len(ratios)} rows in '
            f"{precision} save within {TOLERANCE:.0%} of the paper's figure "
            f'({span(ratios, ".3f")} times it)')
    return ' and '.join(parts)


def rows_table(rows: Sequence[dict]) -> str:
    """Lay out all rows beside the paper's figures."""

    def of_paper(row: dict) -> str:
        before, after = row['gb']
        return (f'{paper_saving(row) / MIB:.0f} '
                f'({(before - after) / before:.1%})')

    return table(rows, {
        'row': label,
        'batch': itemgetter('batch'),
        'precision': itemgetter('precision'),
        'paper: Eval → Tune (GB)':
        lambda row: '{:.3f} → {:.3f}'.format(*row['gb']),
        'Eval here (GB)': lambda row: f'{eval_gb(row):.3f}',
        'paper saves (MiB)': of_paper,
        "MMEngine's saves here (MiB)": lambda row: saved_text(row, 'MMEngine'),
        'here / paper': lambda row: f'{ratio(row):.3f}',
        f'within {TOLERANCE:.0%}':
        lambda row: 'yes' if is_close(ratio(row)) else 'no',
        'mmtune saves (MiB)': lambda row: saved_text(row, 'Tune'),
        "mmtune / MMEngine's": lambda row: f'{over_mmengine(row):.3f}'
    })


def longest(rows: Sequence[dict]) -> dict:
    """Find the row with steps at the most batches."""
    return max(rows, key=lambda row: len(row['steps']))


def several_batches(found: dict) -> list[dict]:
    """Find the rows of the model that the paper has at several batches."""
    models = by('model', found['rows']).values()
    return next((rows for rows in models if len(rows) > 2), [])


def fits(rows: Sequence[dict]) -> dict[str, AffineMemory]:
    """Split savings into what grows with the batch and the rest."""
    paper = fit_affine([row['batch'] for row in rows],
                       [round(paper_saving(row)) for row in rows])
    return dict(paper=paper, **{
        NAMES[mode]: fit(longest(rows), saved_by(mode)) for mode in MODES[1:]
    })


def halves(found: dict) -> dict[str, object]:
    """Write what the page says of FP16."""
    rows = several_batches(found)
    if not rows:
        return {}
    lines, weights = fits(rows), rows[0]['weights']
    here, paper = lines[NAMES['MMEngine']], lines['paper']
    # Without the sign of a zero.
    gap = round((here.fixed - paper.fixed) / weights, 2) + 0
    kept = found['kept_per_weight']
    half = [row for row in found['rows'] + found['suspected']
            if row['precision'] == 'FP16']
    return {
        'fits': table(lines.items(), {
            '': lambda it: it[0],
            'an image (MiB)': lambda it: mib(it[1].per_image),
            'whatever the batch (MiB)': lambda it: mib(it[1].fixed),
            'the latter, bytes for each folded weight':
            lambda it: f'{it[1].fixed / weights:.2f}'
        }),
        'weights': f'{weights / 1e6:.1f}',
        'growth': f'{here.per_image / paper.per_image:.3f}',
        'gap': f'{gap:.2f}',
        **{f'excess-{precision}': f'{of["MMEngine"] - of["Eval"]:.2f}'
           for precision, of in kept.items()},
        'autocast': '; '.join(
            f'{dtype} from ' + ', '.join(
                f'`{name}`' for name, own in found['autocast'].items()
                if own == dtype)
            for dtype in dict.fromkeys(found['autocast'].values())),
        'copies': table(half, {
            'row': label,
            'batch': itemgetter('batch'),
            'as measured': lambda row: f'{ratio(row):.3f}',
            'with the copy': lambda row: f'{ratio_with_copy(row):.3f}'
        })
    }


def suspects(found: dict) -> list[dict]:
    """The row in question, as it is labelled and as it looks."""
    return [row for row in found['rows'] if row['name'] == SUSPECT
            ] + found['suspected']


def steps_table(found: dict) -> str:
    """Lay out what every step takes."""
    models = by('model', found['rows'] + found['suspected'])
    steps = [(row, batch, mode, step)
             for row in map(longest, models.values())
             for batch, by_mode in row['steps'].items()
             for mode, step in by_mode.items()]
    return table(steps, {
        'model': lambda it: label(it[0]),
        'precision': cell('', 0, 'precision'),
        'batch': cell('', 1),
        'mode': cell('', 2),
        'kept for backward': lambda it: mib(it[3]['kept']),
        'peak': lambda it: mib(it[3]['peak']),
        'resident': lambda it: mib(it[3]['resident'])
    })


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    rows = found['rows']
    totals = {label(row): row['gb'][0] / eval_gb(row) for row in rows}
    return {
        'verdict': verdict(rows),
        'shape': '{} x {}'.format(*found['shape']),
        'batches': ', '.join(map(str, found['batches'])),
        'rows': rows_table(rows),
        'more': span(map(over_mmengine, rows), '.3f'),
        'totals': span(totals.values(), '.2f'),
        'less': ', '.join(name for name, value in totals.items()
                          if value < 1) or 'none',
        **halves(found),
        'suspects': table(suspects(found), {
            'model': label,
            'Eval here (GB)': lambda row: f'{eval_gb(row):.3f}',
            'paper: Eval (GB)': cell('.3f', 'gb', 0),
            "MMEngine's saves here (MiB)":
            lambda row: saved_text(row, 'MMEngine'),
            'paper saves (MiB)': lambda row: f'{paper_saving(row) / MIB:.0f}',
            'here / paper': lambda row: f'{ratio(row):.3f}',
            f'within {TOLERANCE:.0%}':
            lambda row: 'yes' if is_close(ratio(row)) else 'no',
            'paper / here': lambda row: f'{1 / ratio(row):.3f}'
        }),
        'steps': steps_table(found)
    }


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    rows, trio, both = found['rows'], several_batches(found), suspects(found)
    lines = fits(trio) if trio else {}
    growth = lines and (lines[NAMES['MMEngine']].per_image
                        / lines['paper'].per_image)
    gap = lines and (lines[NAMES['MMEngine']].fixed - lines['paper'].fixed)
    return {
        'all rows in FP32 save what they save in the paper':
        all(is_close(ratio(row)) for row in rows
            if row['precision'] == 'FP32'),
        "mmtune saves more than MMEngine's rewrite in all rows":
        all(over_mmengine(row) > 1 for row in rows),
        'in FP16 feature maps follow the paper':
        bool(trio) and is_close(growth),
        'the rest differs by about a float32 copy of the folded weights':
        bool(trio) and 3.5 <= gap / trio[0]['weights'] <= 4.5,
        'the row in question fits a ResNet-50 better, in both figures':
        len(both) == 2 and all(
            both[1] is min(both, key=off) for off in (
                lambda row: abs(ratio(row) - 1),
                lambda row: abs(eval_gb(row) - row['gb'][0])))
    }


@drawing(7)
def plot(found: dict, figure: Figure) -> None:
    """Draw what is saved, row by row."""
    rows = sorted(found['rows'], key=paper_saving)
    figure.set_size_inches(8, 1.8 + 0.35 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    axes.axvspan(1 - TOLERANCE, 1 + TOLERANCE, color='tab:green', alpha=0.2,
                 label=f'within {TOLERANCE:.0%} of the paper')
    for mode, marker in zip(MODES[1:], 'ox'):
        axes.plot([ratio(row, mode) for row in rows], places, marker,
                  label=f'{NAMES[mode]}, here')
    axes.set_yticks(places, [
        f'{label(row)}, batch {row["batch"]}: {paper_saving(row) / MIB:.0f}'
        for row in rows
    ])
    axes.set(xlabel='saved here / saved in the paper (MiB, left)')
    axes.grid(axis='x', alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3)


PAGE = Page(run, figures, claims, plot)
