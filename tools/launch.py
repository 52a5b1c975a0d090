"""What train.py and test.py share: arguments, config, runner."""
import argparse
import os
from pathlib import Path

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmtune.engine.checkpoint import allow_mmengine_checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing have in common.

    Args:
        parser (argparse.ArgumentParser): The parser to add them to.
    """
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints (default: work_dir of the '
        'config, else work_dirs/<name of the config>)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that replace those of the config, such as '
        'train_dataloader.batch_size=4; a list is written key="[a,b]", '
        'a tuple key="(a,b)", an item of a list key.0=a')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes')
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help='set by launchers that pass no LOCAL_RANK variable')


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the arguments of :func:`add_arguments`.

    Args:
        args (argparse.Namespace): The parsed arguments.

    Returns:
        Config: The config, with ``work_dir`` and ``launcher`` set.
    """
    config = Config.fromfile(args.config)
    config.launcher = args.launcher
    config.merge_from_dict(args.cfg_options or {})
    if args.work_dir:
        config.work_dir = args.work_dir
    elif not config.get('work_dir'):
        config.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return config


def build_runner(config: Config) -> Runner:
    """Build the runner that the config asks for.

    Args:
        config (Config): A whole config; ``runner_type`` names the class of
            runner, MMEngine's Runner if absent.

    Returns:
        Runner: The runner, not started yet.
    """
    allow_mmengine_checkpoints()
    setup_cache_size_limit_of_dynamo()
    return RUNNERS.build(config)
