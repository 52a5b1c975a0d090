"""Show which Conv+BN blocks of a model Tune mode rewrites, and how they run.

Takes a config, whose mode is shown, or a PyTorch model with --model. Reads no
data and loads no weights. A block in Tune mode whose BatchNorm is in train
mode runs as stock. Activations that are to keep one map are counted, and named
in the file of --json.
"""
import argparse
import copy
from collections import Counter
from dataclasses import asdict
from typing import Any

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
from mmtune.analysis import Block, TensorInfo, list_blocks
from mmtune.api import make_report
from mmtune.arguments import select
from mmtune.matching.pairs import find_pairs
from mmtune.report import Report

TENSORS = dict(weight='w', bias='b', gamma='gamma', beta='beta')
COLUMNS = ('conv', 'bn', 'runs', 'out', 'weight', 'dtype', 'tensors', 'BN',
           'reason')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config',
        nargs='?',
        help='path of the config, or such as '
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    add_arguments(parser)
    args = parser.parse_args()
    if (args.config is None) == (args.model is None):
        parser.error('pass either a config or --model module:callable')
    return args


def find_blocks(model: nn.Module, options: dict) -> tuple[Report, list[Block]]:
    """Turn the mode on; where there is no block for it, say what there is.

    Args:
        model (nn.Module): The model.
        options (dict): Arguments for :func:`mmtune.turn_on`.

    Returns:
        tuple[Report, list[Block]]: With the rows that are left out, where
            all are.

    Raises:
        ValueError: For wrong options.
    """
    # What Deploy folds has no tensors of its own left to show.
    deploys = options['mode'].lower() == 'deploy'
    try:
        report = turn_on(copy.deepcopy(model) if deploys else model, **options)
    except ValueError as error:
        matches = find_pairs(model, select(model, options.get('modules')))
        if matches.pairs:
            raise
        print(error)
        report = make_report(model, 'Tune', matches)
    return report, list_blocks(model, report)


def choose_options(args: argparse.Namespace, config: Any) -> dict:
    """Tell what to turn on, and say where a run would differ.

    Args:
        args (argparse.Namespace): The parsed arguments.
        config (Config | None): The config.

    Returns:
        dict: Arguments for :func:`mmtune.turn_on`.
    """
    options = get_options(args, config)
    if config is not None and 'mode' not in options:
        print('Nothing in this config turns Tune mode on; with '
              "default_hooks=dict(tune_mode=dict(type='mmtune.TuneModeHook')) "
              'it would be this:')
    options.setdefault('mode', 'Tune')
    begin = options.pop('begin', None)
    if begin is not None:
        options['norm_eval'] = True
        print(f'This is how it is from epoch {begin} on; before, BatchNorms '
              'are as the config has them:')
    return options


def tensors_of(block: Block) -> dict[str, TensorInfo]:
    """Give the tensors that a block has.

    Args:
        block (Block): The block.

    Returns:
        dict[str, TensorInfo]: By their short names.
    """
    tensors = {short: getattr(block, name) for name, short in TENSORS.items()}
    return {
        short: tensor
        for short, tensor in tensors.items() if tensor is not None
    }


def count(blocks: list[Block]) -> dict:
    """Add up the blocks.

    Args:
        blocks (list[Block]): All of them.

    Returns:
        dict: How many there are; how many run how in a training step, and
            in how many of those something learns; and how many are left out
            for which reason.
    """
    return dict(
        blocks=len(blocks),
        runs=Counter(block.runs for block in blocks),
        learning=Counter(
            block.runs for block in blocks
            if any(tensor.learns for tensor in tensors_of(block).values())),
        left_out=Counter(block.reason for block in blocks if block.reason))


def make_row(block: Block) -> list:
    """Write a block down as a row of the table.

    Args:
        block (Block): The block.

    Returns:
        list: A cell for each of ``COLUMNS``.
    """
    tensors = tensors_of(block)
    shape = block.weight and block.weight.shape
    return [
        block.conv or '-', block.bn, block.runs, block.out_channels or '?',
        'x'.join(map(str, shape)) if shape else '-',
        ' '.join(dict.fromkeys(tensor.dtype for tensor in tensors.values())),
        ' '.join(short + '*' * tensor.learns
                 for short, tensor in tensors.items()),
        'eval' if block.bn_is_fixed else 'train', block.reason
    ]


def main() -> None:
    args = parse_args()
    with stage('Build the model'):
        config = get_config(args)
        model = get_model(args, config)
    options = choose_options(args, config)
    with stage('Look for blocks'):
        report, blocks = find_blocks(model, options)
    totals = count(blocks)
    show_table(COLUMNS, [make_row(block) for block in blocks])
    print(f'{report.summary()}. Blocks where something learns (*): '
          f'{sum(totals["learning"].values())}.')
    write_json(
        args.json,
        dict(
            source=args.config or args.model,
            options=options,
            totals=totals,
            activations=report.activations,
            blocks=[dict(asdict(block), runs=block.runs)
                    for block in blocks]))
    write_plot(args.plot, 'plot_blocks', blocks)


if __name__ == '__main__':
    run(main)
