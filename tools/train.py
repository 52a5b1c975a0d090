"""Train a detector."""
import argparse

from launch import add_arguments, build_runner, load_config
from mmengine.config import Config


def parse_args() -> argparse.Namespace:
    """Parse the command line.

    Returns:
        argparse.Namespace: The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train with automatic mixed precision (not on CPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate linearly from the batch size that the '
        'config was made for to the one in use')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint; without a value, from the '
        'latest one in the work dir')
    return parser.parse_args()


def apply_train_options(config: Config, args: argparse.Namespace) -> None:
    """Write the arguments that only training has into the config.

    Args:
        config (Config): The config, changed in place.
        args (argparse.Namespace): The parsed arguments.

    Raises:
        ValueError: If the learning rate is to be scaled and the config does
            not say which batch size it was made for.
    """
    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
            raise ValueError(
                '`--auto-scale-lr` needs the batch size that the learning '
                'rate was chosen for, but the config has no '
                '`auto_scale_lr.base_batch_size`; set it, e.g. with '
                '`--cfg-options auto_scale_lr.base_batch_size=16`.')
        config.auto_scale_lr.enable = True
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == 'auto' else args.resume


def main() -> None:
    """Train as the command line says."""
    args = parse_args()
    config = load_config(args)
    apply_train_options(config, args)
    build_runner(config).train()


if __name__ == '__main__':
    main()
