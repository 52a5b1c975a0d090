"""Show which Conv+BN blocks of a model Tune mode rewrites, and how they run.

Takes a config, or a PyTorch model with --model. Reads no data and loads no
weights. A block in Tune mode whose BatchNorm is in train mode runs as stock.
"""
import argparse
from collections import Counter
from dataclasses import asdict

from shared import (
    add_arguments,
    quiet_mmengine,
    run,
    show_table,
    stage,
    write_json,
)
from torch import nn

from mmtune import turn_on
from mmtune.analysis import Block, TensorInfo, list_blocks
from mmtune.analysis.sources import (
    build_model,
    call_for_model,
    load_config,
    tune_options,
)
from mmtune.api import make_report, select
from mmtune.matching import find_pairs
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


def get_model(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Build what the command line asks for.

    Args:
        args (argparse.Namespace): The parsed arguments.

    Returns:
        tuple[nn.Module, dict]: The model in train mode, and the arguments
            for :func:`mmtune.turn_on`.
    """
    options = {}
    if args.model:
        model = call_for_model(args.model)
    else:
        quiet_mmengine()
        config = load_config(args.config)
        options = tune_options(config)
        model = build_model(config)
    if args.modules:
        options['modules'] = args.modules
    return model, options


def find_blocks(model: nn.Module, options: dict) -> Report:
    """Turn Tune mode on; where there is no block for it, say what there is.

    Args:
        model (nn.Module): The model.
        options (dict): Arguments for :func:`mmtune.turn_on`.

    Returns:
        Report: With the rows that are left out, where all are.

    Raises:
        ValueError: For wrong options.
    """
    try:
        return turn_on(model, 'Tune', **options)
    except ValueError as error:
        matches = find_pairs(model, select(model, options.get('modules')))
        if matches.pairs:
            raise
        print(error)
        return make_report(model, 'Tune', matches)


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
        model, options = get_model(args)
    with stage('Look for blocks'):
        report = find_blocks(model, options)
        blocks = list_blocks(model, report)
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
            blocks=[dict(asdict(block), runs=block.runs)
                    for block in blocks]))
    if args.plot:
        from mmtune.analysis.plots import plot_blocks
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_blocks(blocks, args.plot)
        print(f'Wrote {args.plot}')


if __name__ == '__main__':
    run(main)
