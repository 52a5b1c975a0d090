"""Tell where training in Deploy mode would take other steps than Tune mode.

Deploy learns coeff * w in the place of w, with coeff = gamma / sqrt(var +
eps). Its step of a channel is that of Tune divided by coeff ** 2 (by |coeff|
for Adam), so that small scales make it unstable: docs/en/deploy.md. Reads no
data.
"""
import argparse
import functools
import math
import sys
from collections import Counter

import torch
from shared import (
    add_arguments,
    get_config,
    get_model,
    get_options,
    run,
    show_table,
    stage,
    write_json,
    write_plot,
)
from torch import nn

from mmtune import turn_on
from mmtune.analysis import BlockScale, block_scales, diagnose
from mmtune.analysis.scales import POWERS, QUANTILES
from mmtune.analysis.sources import (
    load_fitting,
    optimizer_options,
    read_state_dict,
)
from mmtune.report import Report

CONFIG_SUFFIXES = ('.py', '.json', '.yml', '.yaml')
# What an optimizer of a config counts as.
OPTIMIZERS = {'SGD': 'SGD', 'Adam': 'Adam', 'AdamW': 'Adam'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'source',
        nargs='?',
        metavar='CHECKPOINT|CONFIG',
        help='a checkpoint, together with --config or --model; or a config '
        'that names the weights it starts from (load_from, or init_cfg of '
        'type Pretrained)')
    parser.add_argument(
        '--config', help='the config that the checkpoint was made with')
    add_arguments(parser)
    parser.add_argument(
        '--factor',
        type=functools.partial(number, least=1.),
        default=10,
        help="by how much a step may differ from Tune's to follow it still "
        '(default: %(default)g)')
    parser.add_argument(
        '--optimizer',
        choices=POWERS,
        help="default: the config's, else SGD")
    parser.add_argument(
        '--lr',
        type=functools.partial(number, least=sys.float_info.min),
        help="Tune's learning rate (default: the config's); limits are given "
        'as multiples of it in any case')
    args = parser.parse_args()
    if args.source and args.source.endswith(CONFIG_SUFFIXES):
        if args.config:
            parser.error('pass one config: as CONFIG, or as --config with a '
                         'CHECKPOINT')
        args.source, args.config = None, args.source
    if args.config and args.model:
        parser.error('pass either a config or --model')
    if not (args.config or args.model):
        parser.error(
            'a checkpoint has neither eps nor the order of the layers; add '
            '--config CONFIG or --model module:callable, what it was made '
            'with')
    return args


def number(text: str, least: float) -> float:
    """Read a finite number.

    Args:
        text (str): From the command line.
        least (float): The smallest that there may be.

    Returns:
        float: The number.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f'must be a finite number, {least:g} or more, but got {text!r}')
    return value


def load_model(
        args: argparse.Namespace) -> tuple[nn.Module, list[str] | None, dict]:
    """Build what the command line asks for, and load its weights.

    Args:
        args (argparse.Namespace): The parsed arguments.

    Returns:
        tuple[nn.Module, list[str] | None, dict]: The model in train mode,
            the names of the modules to fold as :func:`mmtune.turn_on` takes
            them, and the arguments of the config's optimizer.
    """
    config = get_config(args)
    trained_with = {} if config is None else optimizer_options(config)
    checkpoint = args.source or (config and config.get('load_from'))
    model = get_model(args, config, pretrained=not checkpoint)
    if checkpoint:
        state_dict = read_state_dict(checkpoint)
        loaded = load_fitting(model, state_dict)
        print(f'{loaded} of the {len(state_dict)} tensors in {checkpoint} '
              f'fit the model, which has {len(model.state_dict())}')
    options = get_options(args, config)
    return model, options.get('modules'), trained_with


def choose_optimizer(args: argparse.Namespace, trained_with: dict) -> None:
    """Fill in what the command line leaves to the config.

    Args:
        args (argparse.Namespace): ``optimizer`` and ``lr`` are set.
        trained_with (dict): Arguments of the config's optimizer.

    Raises:
        ValueError: If the config's optimizer is neither SGD nor Adam.
    """
    if args.optimizer is None:
        found = trained_with.get('type', 'SGD')
        name = found if isinstance(found, str) else found.__name__
        if name not in OPTIMIZERS:
            raise ValueError(
                f'the config trains with {name}, of which nothing is known '
                'here; pass --optimizer SGD or --optimizer Adam, whichever '
                'it resembles')
        args.optimizer = OPTIMIZERS[name]
    if args.lr is None:
        args.lr = trained_with.get('lr')


def explain(found: dict, args: argparse.Namespace) -> str:
    """Say why a block would make training in Deploy mode unstable.

    Args:
        found (dict): What :func:`mmtune.analysis.diagnose` says of it.
        args (argparse.Namespace): The parsed arguments.

    Returns:
        str: Empty where it would not.
    """
    count = round(found['at_same_lr']['faster'] * found['channels'])
    if not count:
        return ''
    channels = f'{count} channel{"s" * (count != 1)}'
    smallest = found['coeff']['min']
    if not smallest:
        return f'{channels}, {found["zeros"]} of them at rest in Tune mode'
    ratio = smallest**-POWERS[args.optimizer]
    return f'{channels}, up to {ratio:.2g} times as far'


def make_row(name: str, found: dict, args: argparse.Namespace) -> list[str]:
    """Write down a block, or all of them, as a row of the table.

    Args:
        name (str): What it is about.
        found (dict): What :func:`mmtune.analysis.diagnose` says of it.
        args (argparse.Namespace): The parsed arguments.

    Returns:
        list[str]: A cell for each column.
    """
    at_same_lr = found['at_same_lr']
    return [
        name,
        str(found['channels']),
        *(f'{value:.2g}' for value in found['coeff'].values()),
        *(f'{at_same_lr[key]:.1%}' for key in ('faster', 'slower')),
        f'{found["limits"][0]["lr"]:.2g}',
        explain(found, args)
    ]


def find_scales(
        model: nn.Module,
        modules: list[str] | None) -> tuple[list[BlockScale], Report]:
    """Compute the scales of the blocks that Deploy mode folds.

    Args:
        model (nn.Module): The model; is in Deploy mode afterwards.
        modules (list[str], optional): For :func:`mmtune.turn_on`.

    Returns:
        tuple[list[BlockScale], Report]: The scales, and the report of
            Deploy mode.
    """
    # Deploy folds for good, and fewer blocks than Tune.
    scales = block_scales(model, turn_on(model, 'Tune', modules))
    report = turn_on(model, 'Deploy', modules)
    folded = {row.bn for row in report.rewritten}
    return [block for block in scales if block.bn in folded], report


def show_blocks(names: list[str], found: list[dict],
                args: argparse.Namespace) -> None:
    """Print a table of blocks.

    Args:
        names (list[str]): What each row is about.
        found (list[dict]): What :func:`mmtune.analysis.diagnose` says of it.
        args (argparse.Namespace): The parsed arguments.
    """
    columns = [
        'bn', 'channels', *(f'|coeff| {name}' for name in QUANTILES),
        'too far', 'too short', 'max lr', 'why'
    ]
    show_table(columns,
               [make_row(*row, args) for row in zip(names, found)])


def show_learning_rates(total: dict, args: argparse.Namespace) -> None:
    """Print which learning rates Deploy mode would take.

    Args:
        total (dict): What :func:`mmtune.analysis.diagnose` says of all
            blocks together.
        args (argparse.Namespace): The parsed arguments.
    """
    best, factor = total['best'], f'{args.factor:g}'
    print(f'{args.optimizer}: Deploy steps as far as Tune divided by '
          f'|coeff|^{POWERS[args.optimizer]}. Too far is more than {factor} '
          f'times as far at the same learning rate, too short less than '
          f'1/{factor}; max lr is where no channel steps too far.')
    rows = [(f'{limit["share"]:.1%} do not step too far', limit['lr'],
             'rule of thumb' if limit['share'] < 1 else 'bound')
            for limit in total['limits']]
    rows.append((f'{best["share"]:.1%} step neither too far nor too short',
                 best['lr'], 'at best'))
    show_table(['of the channels', "lr / Tune's", 'lr', ''],
               [(text, f'{multiple:.3g}',
                 f'{multiple * args.lr:.3g}' if args.lr else '-', kind)
                for text, multiple, kind in rows])


def verdict(names: list[str], found: list[dict], total: dict,
            args: argparse.Namespace) -> str:
    """Say whether training in Deploy mode would be safe.

    Args:
        names (list[str]): Of the blocks.
        found (list[dict]): What :func:`mmtune.analysis.diagnose` says of
            each.
        total (dict): The same of all together.
        args (argparse.Namespace): The parsed arguments.

    Returns:
        str: A sentence or two.
    """
    worst = max(range(len(found)),
                key=lambda i: found[i]['at_same_lr']['faster'])
    faster = total['at_same_lr']['faster']
    bound = total['limits'][0]['lr']
    safe = (f"{bound:.3g} times Tune's learning rate"
            + (f', {bound * args.lr:.3g}' if args.lr else ''))
    if not faster:
        return ("Training in Deploy mode at Tune's learning rate steps too "
                f'far in no channel; that holds up to {safe}.')
    return ("Training in Deploy mode at Tune's learning rate may be "
            f'unstable: {faster:.1%} of the channels step too far, most of '
            f'all in {names[worst]!r} ({explain(found[worst], args)}). '
            + (f'No channel does up to {safe}.' if bound else
               'No learning rate is safe, since some scales are zero.'))


def main() -> None:
    args = parse_args()
    with stage('Build the model and load its weights'):
        model, modules, trained_with = load_model(args)
    choose_optimizer(args, trained_with)
    with stage('Look for blocks'):
        scales, report = find_scales(model, modules)
    used = [block for block in scales if not block.reason]
    unused = Counter(block.reason for block in scales if block.reason)
    if not used:
        reasons = [f'{count} x {reason}' for reason, count in unused.items()]
        raise ValueError(
            f'there is no block to diagnose: {"; ".join(reasons)}; pass a '
            'checkpoint that was trained, of a model that learns')
    coeffs = [block.coeff for block in used]
    *blocks, total = (
        diagnose(coeff, args.factor, args.optimizer)
        for coeff in [*coeffs, torch.cat(coeffs)])

    show_blocks([*(block.bn for block in used), 'all'], [*blocks, total],
                args)
    print(report.summary())
    for reason, count in unused.items():
        print(f'{count} of them do not count: {reason}')
    learning = sum(block.gamma_learns for block in used)
    if learning:
        print(f'gamma learns in {learning} blocks; docs/en/deploy.md says '
              'what that changes')
    show_learning_rates(total, args)
    print(verdict([block.bn for block in used], blocks, total, args))
    write_json(
        args.json,
        dict(
            source=args.source or args.config or args.model,
            modules=modules,
            optimizer=args.optimizer,
            lr=args.lr,
            factor=args.factor,
            left_out=Counter(row.reason for row in report.left_out),
            not_counted=unused,
            total=total,
            blocks=[
                dict(
                    conv=block.conv,
                    bn=block.bn,
                    gamma_learns=block.gamma_learns,
                    **found) for block, found in zip(used, blocks)
            ]))
    write_plot(args.plot, 'plot_scales', [found['coeff'] for found in blocks],
               args.factor, args.optimizer)


if __name__ == '__main__':
    run(main)
