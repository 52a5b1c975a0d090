"""Adversarial examples: whether Tune finds those of Eval, and at what cost."""
import math
from collections.abc import Callable

from matplotlib.figure import Figure

from reproductions.adversarial_runs import EXACT_MODES, MODES, run
from reproductions.page import (
    MIB,
    Page,
    cell,
    drawing,
    mib,
    sheet,
    span,
    table,
)

# What is a success of each target.
SUCCESS = dict(classifier='digits recognised', detector='trees found')


def spared_text(targets: dict[str, dict], key: str) -> str:
    """Write the share of Eval's bytes that Tune spares on each target."""
    return ' and '.join(
        f'{1 - rows["Tune"][key] / rows["Eval"][key]:.0%} ({name})'
        for name, rows in ((name, target['rows'])
                           for name, target in targets.items()))


def figures(found: dict) -> dict[str, object]:
    """Write what the page shows."""
    targets = found['targets']
    values: dict[str, object] = {
        'ends': span([target['rows'][mode]['from_exact'][-1]
                      for target in targets.values() for mode in EXACT_MODES],
                     '.0%'),
        'kept': spared_text(targets, 'kept'),
        'peak': spared_text(targets, 'peak'),
        'steps': found['steps'],
        'digits': found['train_digits'],
        'iterations': found['iterations'],
        'attacked': targets['classifier']['shape'][0],
        'in-images': targets['detector']['shape'][0],
        'signs': signs(targets)
    }
    for name, target in targets.items():
        values[f'{name}-shape'] = ' x '.join(map(str, target['shape']))
        rows = [dict(row, mode=mode) for mode, row in target['rows'].items()]
        for kind, columns in tables(name, target, found['steps']).items():
            values[f'{name}-{kind}'] = table(
                rows, {'mode': cell('', 'mode'), **columns})
    return values


def signs(targets: dict[str, dict]) -> str:
    """Lay out whether Tune finds what Eval finds."""

    def count(target: dict, share: float) -> str:
        return f'{share * math.prod(target["shape"]):.0f}'

    def apart(target: dict) -> str:
        stock, tune = (target['rows'][mode]['losses'][1]
                       for mode in EXACT_MODES)
        return f'{abs(tune / stock - 1):.1%}'

    from_eval = 'rows', 'Tune', 'from_eval'
    return sheet('', targets, {
        'values in the images': lambda it: math.prod(it['shape']),
        'in float64: values that differ after the last step':
        lambda it: count(it, it['exact']['differing'][-1]),
        'losses differ by at most': cell('.1e', 'exact', 'loss_difference'),
        'in float32: signs that differ in the first step':
        cell('d', *from_eval, 'flipped'),
        "Eval's that differ from those in float64 there":
        lambda it: count(it, it['rows']['Eval']['from_exact'][0]),
        'the gradient at these values, of the usual (medians)':
        cell('.1e', *from_eval, 'median_flipped'),
        'the same, at most': cell('.1e', *from_eval, 'largest_flipped'),
        'in the end Eval misses of what float64 finds':
        cell('.1%', 'rows', 'Eval', 'from_exact', -1),
        'and Tune': cell('.1%', 'rows', 'Tune', 'from_exact', -1),
        'the losses that they reach differ by': apart,
        'blocks of Tune, by how they ran': lambda it: ', '.join(
            f'{count} {kind}' for kind, count in it['ran'].items())
    })


def tables(name: str, target: dict, steps: int) -> dict[str, dict]:
    """Give the columns of the tables about a target, a row a mode."""

    def of_eval(key: str) -> Callable[[dict], str]:
        return lambda row: f'{row[key] / target["rows"]["Eval"][key]:.3f}'

    return {
        'perturbation': {
            'differs from Eval after 1 step':
            cell('.1e', 'from_eval', 'differing', 0),
            f'from Eval after {steps}':
            cell('.1e', 'from_eval', 'differing', -1),
            'loss differs by': cell('.1e', 'from_eval', 'loss_difference'),
            'differs from float64 after 1 step':
            cell('.1e', 'from_exact', 0),
            f'from float64 after {steps}': cell('.1e', 'from_exact', -1)
        },
        'success': {
            'loss before': cell('.3f', 'losses', 0),
            'loss after': cell('.3f', 'losses', 1),
            f'{SUCCESS[name]} before': cell('.0%', 'success', 0),
            'after': cell('.0%', 'success', 1)
        },
        'cost': {
            'kept, MiB': lambda row: mib(row['kept']),
            'kept / Eval': of_eval('kept'),
            'peak, MiB': lambda row: mib(row['peak']),
            'peak / Eval': of_eval('peak'),
            'time of a step, s': cell('.3f', 'seconds'),
            'time / Eval':
            lambda row: '{1:.3f} ({0:.3f}-{2:.3f})'.format(*row['ratio'])
        }
    }


def claims(found: dict) -> dict[str, bool]:
    """Tell what the page says, and whether it is so."""
    targets = found['targets'].values()
    return {
        'in float64 Tune finds the same perturbation as Eval':
        not any(any(target['exact']['differing']) for target in targets),
        'in float32 some signs differ in the first step':
        all(target['rows']['Tune']['from_eval']['flipped']
            for target in targets),
        'the attacks of all modes succeed alike':
        all(len({row['success'][1] for row in target['rows'].values()}) == 1
            for target in targets),
        'Tune keeps less than Deploy':
        all(target['rows']['Tune']['kept'] < target['rows']['Deploy']['kept']
            for target in targets),
        'a step of Tune takes no more time':
        all(target['rows']['Tune']['ratio'][0] <= 1 for target in targets)
    }


@drawing(7)
def plot(found: dict, figure: Figure) -> None:
    """Draw where perturbations differ and what is kept."""
    grid = figure.subplots(2, len(found['targets']))
    colors = dict(zip(MODES, ('C0', 'C1', 'C2', 'C3')))
    for column, (name, target) in enumerate(found['targets'].items()):
        top, bottom = grid[:, column]
        steps = range(1, found['steps'] + 1)
        for mode, row in target['rows'].items():
            top.plot(steps, row['from_exact'], color=colors[mode],
                     label=f'{mode}, float32')
        top.plot(steps, target['exact']['differing'], '--',
                 color=colors['Tune'], label='Tune, float64')
        top.set_yscale('symlog', linthresh=1e-6)
        top.set(title=name, xlabel='step', ylim=(0, 1),
                ylabel='values unlike those of Eval in float64')
        for offset, key in ((-.2, 'kept'), (.2, 'peak')):
            bars = bottom.bar(
                [i + offset for i in range(len(MODES))],
                [row[key] / MIB for row in target['rows'].values()], .4,
                color=colors.values(), alpha=1 if key == 'kept' else .5)
            bottom.bar_label(bars, fmt='%.0f', fontsize=8)
        bottom.set_xticks(range(len(MODES)), labels=list(target['rows']))
        bottom.set(ylabel='MiB', title='kept for backward; pale: peak')
    figure.legend(*grid[0, 0].get_legend_handles_labels(),
                  loc='outside lower center', ncols=3)


PAGE = Page(run, figures, claims, plot)
