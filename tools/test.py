"""Test a detector: evaluate a checkpoint, save or show its detections."""
import argparse

from launch import add_arguments, build_runner, load_config
from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmengine.config import Config


def parse_args() -> argparse.Namespace:
    """Parse the command line.

    Returns:
        argparse.Namespace: The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument(
        '--out',
        metavar='FILE.pkl',
        help='save the detections to this pickle file')
    parser.add_argument(
        '--show', action='store_true', help='show each image in a window')
    parser.add_argument(
        '--show-dir',
        help='save the drawn images in this folder under '
        '<work dir>/<time stamp>')
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that --show keeps an image (default: 2)')
    return parser.parse_args()


def apply_test_options(config: Config, args: argparse.Namespace) -> None:
    """Write the arguments that only testing has into the config.

    Args:
        config (Config): The config, changed in place.
        args (argparse.Namespace): The parsed arguments.
    """
    config.load_from = args.checkpoint
    if args.out:
        metrics = config.test_evaluator
        if not isinstance(metrics, list):
            metrics = [metrics]
        dump = dict(type='DumpDetResults', out_file_path=args.out)
        config.test_evaluator = [*metrics, dump]
    if args.show or args.show_dir:
        trigger_visualization_hook(config, args)


def main() -> None:
    """Test as the command line says."""
    args = parse_args()
    config = load_config(args)
    apply_test_options(config, args)
    build_runner(config).test()


if __name__ == '__main__':
    main()
