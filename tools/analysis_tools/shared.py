"""What the analysis tools share: arguments, models, output.

Without rich, tables are plain text: with ``--model`` a tool needs torch and
nothing else.
"""
import argparse
import contextlib
import copy
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune.analysis.machine import describe_machine
from mmtune.analysis.modes import MODES, put_in_mode, randomize_new_norms
from mmtune.analysis.sources import (
    build_model,
    call_for_model,
    load_config,
    trains_with_amp,
    tune_options,
)
from mmtune.analysis.steps import GRADIENTS
from mmtune.analysis.workloads import (
    Workload,
    detection_workload,
    image_workload,
)
from mmtune.arguments import select
from mmtune.report import Report

if TYPE_CHECKING:
    from mmengine.config import Config

PICTURES = ('.png', '.pdf', '.svg')

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all analysis tools have.

    Args:
        parser (argparse.ArgumentParser): The parser to add them to.
    """
    parser.add_argument(
        '--model',
        metavar='MODULE:CALLABLE',
        help='a function or class that gives a PyTorch model, such as '
        'torchvision.models:resnet50; looked for in this folder too')
    parser.add_argument(
        '--modules',
        nargs='+',
        metavar='NAME',
        help='submodules to look at, such as backbone (default: those of the '
        "config's efficient_conv_bn_eval, else the whole model)")
    parser.add_argument(
        '--json',
        type=output_file,
        metavar='FILE.json',
        help='write everything that was found to this file')
    parser.add_argument(
        '--plot',
        type=picture_file,
        metavar='FILE.png',
        help='draw it into this picture; needs matplotlib')
    # A script looks for modules in its own folder, but not in this one.
    sys.path.append(os.getcwd())


def output_file(text: str) -> Path:
    """Read the name of a file to write, before anything is measured for it.

    Args:
        text (str): From the command line.

    Returns:
        Path: In a folder that there is, or that can be made.

    Raises:
        argparse.ArgumentTypeError: If it cannot be written.
    """
    path = Path(text)
    parent = next(folder for folder in path.absolute().parents
                  if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f'must be a file that can be written, but got {text!r}')
    return path


def picture_file(text: str) -> Path:
    """Read the name of a picture to write.

    Args:
        text (str): From the command line.

    Returns:
        Path: See :func:`output_file`.

    Raises:
        argparse.ArgumentTypeError: If matplotlib cannot write it.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise argparse.ArgumentTypeError(
            'needs matplotlib, but it is not installed; pip install it')
    if not text.endswith(PICTURES):
        raise argparse.ArgumentTypeError(
            f'must end in {", ".join(PICTURES)}, but got {text!r}')
    return output_file(text)


def run(main: Callable[[], None]) -> None:
    """Run a tool; what its user can mend is said in a sentence.

    Args:
        main (Callable[[], None]): Raises ValueError, OSError or ImportError
            for what the user can mend.
    """
    try:
        main()
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        sys.stdout = open(os.devnull, 'w')
    except (ValueError, OSError, ImportError) as error:
        text = ' '.join(str(error).split()) or type(error).__name__
        sys.exit(f'{Path(sys.argv[0]).name}: error: {text}')


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the tools that take training steps.

    Args:
        parser (argparse.ArgumentParser): The parser to add them to.
    """
    parser.add_argument(
        'config',
        nargs='?',
        help='path of the config of a detector, or such as '
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    add_arguments(parser)
    names = [option_of(mode) for mode in MODES]
    parser.add_argument(
        '--modes',
        nargs='+',
        type=str.lower,
        choices=names,
        default=names,
        help='what to compare (default: all)')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=positive,
        default=[800, 1344],
        metavar=('HEIGHT', 'WIDTH'),
        help='of the images, in pixels (default: 800 1344)')
    parser.add_argument(
        '--amp',
        action=argparse.BooleanOptionalAction,
        help='run under autocast, or not (default: as the config trains): in '
        'float16 on a GPU, on a CPU in bfloat16, which is as large; but a GPU '
        'runs normalizations other than BatchNorm, softmax and sums in '
        'float32, which takes more')
    parser.add_argument(
        '--grad-to',
        choices=GRADIENTS,
        default='params',
        help='what learns: the parameters, or the input, as in the search '
        'for adversarial examples (default: %(default)s)')
    parser.add_argument(
        '--device',
        choices=('cpu', 'cuda'),
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: here %(default)s')


def parse_step_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and check what the steps are of.

    Args:
        parser (argparse.ArgumentParser): After :func:`add_step_arguments`.

    Returns:
        argparse.Namespace: The arguments; ``modes`` named and ordered as in
            ``MODES``.
    """
    args = parser.parse_args()
    if (args.config is None) == (args.model is None):
        parser.error('pass either a config or --model module:callable')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a GPU that torch can use, but '
                     f'torch {torch.__version__} finds none')
    args.modes = [mode for mode in MODES if option_of(mode) in args.modes]
    return args


def option_of(mode: str) -> str:
    """Name a mode as the command line does.

    Args:
        mode (str): One of ``MODES``.

    Returns:
        str: In lower case, its words joined by hyphens.
    """
    return mode.lower().replace(',', '').replace(' ', '-')


def positive(text: str) -> int:
    """Read a number that is at least 1.

    Args:
        text (str): From the command line.

    Returns:
        int: The number.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f'must be a whole number from 1 on, but got {text!r}')
    return int(text)


@dataclass(frozen=True)
class Stock:
    """A stock model, to be put into modes.

    Attributes:
        model (nn.Module): In train mode, on its device.
        modules (list[str], optional): The submodules that it is about.
        norm_eval (bool): Whether a run holds their BatchNorms in eval mode.
        amp (bool): Whether steps run under autocast.
        workload (Callable[[int], Workload]): Makes a workload of so many
            images.
    """

    model: nn.Module
    modules: list[str] | None
    norm_eval: bool
    amp: bool
    workload: Callable[[int], Workload]

    def in_mode(self, mode: str) -> tuple[nn.Module, Report | None]:
        """Put a copy into a mode.

        Args:
            mode (str): One of ``MODES``.

        Returns:
            tuple[nn.Module, Report | None]: The copy, and what
                :func:`mmtune.analysis.modes.put_in_mode` returns.
        """
        model = copy.deepcopy(self.model)
        return model, put_in_mode(model, mode, self.modules)


def get_stock(args: argparse.Namespace) -> Stock:
    """Build what the command line asks for, with weights that are random.

    Args:
        args (argparse.Namespace): From :func:`parse_step_args`.

    Returns:
        Stock: Always the same.
    """
    torch.manual_seed(0)
    shape = tuple(args.shape)
    config = get_config(args)
    model = get_model(args, config)
    options = get_options(args, config)
    amp = args.amp
    if amp is None:
        amp = config is not None and trains_with_amp(config)
    modules = options.get('modules')
    if isinstance(modules, str):
        modules = [modules]
    randomize_new_norms(model)
    model.to(args.device)

    def workload(batch_size: int) -> Workload:
        if config is None:
            return image_workload(shape, batch_size, args.device)
        return detection_workload(config, model, shape, batch_size)

    return Stock(model, modules, bool(options.get('norm_eval')), amp, workload)


def get_config(args: argparse.Namespace) -> 'Config | None':
    """Read the config that the command line names.

    Args:
        args (argparse.Namespace): With ``config`` or ``model``.

    Returns:
        Config | None: None where it names a callable.
    """
    if args.model:
        return None
    quiet_mmengine()
    return load_config(args.config)


def get_model(args: argparse.Namespace,
              config: 'Config | None',
              pretrained: bool = False) -> nn.Module:
    """Build the model that the command line names.

    Args:
        args (argparse.Namespace): With ``config`` or ``model``.
        config (Config | None): From :func:`get_config`.
        pretrained (bool): Whether to load the weights that a config names.

    Returns:
        nn.Module: Stock, on the CPU, in train mode.
    """
    if config is None:
        return call_for_model(args.model)
    return build_model(config, pretrained)


def get_options(args: argparse.Namespace,
                config: 'Config | None') -> dict[str, Any]:
    """Tell what a run would turn on.

    Args:
        args (argparse.Namespace): Its ``modules`` win.
        config (Config | None): From :func:`get_config`.

    Returns:
        dict[str, Any]: See :func:`mmtune.analysis.sources.tune_options`.
    """
    options = {} if config is None else tune_options(config)
    if args.modules:
        options['modules'] = args.modules
    return options


def say_what_trains(stock: Stock) -> None:
    """Print where the modes differ from how the model is trained.

    Args:
        stock (Stock): As it is trained.
    """
    if stock.norm_eval:
        return
    # Each once, though a submodule may be named beside one that holds it.
    norms = {
        module for part in select(stock.model, stock.modules)
        for module in part.modules() if isinstance(module, _BatchNorm)
    }
    training = sum(norm.training for norm in norms)
    if training:
        print(f'{training} of {len(norms)} BatchNorms are in train mode in a '
              'run of this model, as in Train; the other modes hold them in '
              'eval mode (norm_eval=True)')


def measure_modes(modes: Sequence[str],
                  measure: Callable[[str], dict]) -> dict[str, dict]:
    """Measure one mode after the other, Eval first.

    Args:
        modes (Sequence[str]): Names from ``MODES``.
        measure (Callable[[str], dict]): Is called with each of them.

    Returns:
        dict[str, dict]: What was measured of each, in the order of
            ``MODES``. Of a mode that raised, ``failed`` says what.

    Raises:
        Exception: Whatever Eval, which is stock, raises, but for a lack of
            memory, which another mode may do without.
    """
    found = {}
    for mode in ['Eval', *(mode for mode in modes if mode != 'Eval')]:
        try:
            found[mode] = measure(mode)
        except Exception as error:
            if mode == 'Eval' and not isinstance(error,
                                                 torch.OutOfMemoryError):
                raise
            message = str(error).strip().partition('\n')[0]
            found[mode] = dict(failed=f'{type(error).__name__}: {message}')
            print(f'{mode} failed: {found[mode]["failed"]}')
    return {mode: found[mode] for mode in MODES if mode in found}


def describe(args: argparse.Namespace, stock: Stock) -> dict:
    """Tell what was measured, and where.

    Args:
        args (argparse.Namespace): From :func:`parse_step_args`.
        stock (Stock): What it was measured on.

    Returns:
        dict: Plain data.
    """
    return dict(
        source=args.config or args.model,
        modules=stock.modules,
        shape=args.shape,
        amp=stock.amp,
        grad_to=args.grad_to,
        threads=torch.get_num_threads(),
        **describe_machine(args.device))


def quiet_mmengine() -> None:
    """Keep MMEngine from telling how every parameter was initialized."""
    from mmengine.logging import MMLogger
    # It warns of each parameter that is frozen, too.
    MMLogger.get_instance('analysis', log_level='ERROR')


@contextlib.contextmanager
def stage(text: str) -> Iterator[None]:
    """Show what is being done as long as it is.

    Args:
        text (str): Such as ``'Build the model'``.
    """
    if Console is None or not sys.stderr.isatty():
        print(f'{text} ...', file=sys.stderr)
        yield
        return
    with Console(stderr=True).status(text):
        yield


def show_table(columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Print a table.

    Args:
        columns (Sequence[str]): Their titles.
        rows (Sequence[Sequence]): Cells, shown as ``str`` does.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if Console is None:
        print('\n'.join('\t'.join(row) for row in [columns, *cells]))
        return
    table = Table(*columns, box=None)
    for row in cells:
        table.add_row(*row)
    # Wider than most terminals, which break lines: cells that rich makes
    # narrower would break in the middle of numbers.
    Console(width=250).print(table)


def write_plot(path: Path | None, name: str, *found: object) -> None:
    """Draw what a tool has found, where a picture was asked for.

    Args:
        path (Path, optional): Its folder is made where there is none.
        name (str): Of the function of :mod:`mmtune.analysis.plots` to draw
            by, which needs matplotlib.
        *found: What it takes before the path.
    """
    if path is None:
        return
    from mmtune.analysis import plots
    path.parent.mkdir(parents=True, exist_ok=True)
    getattr(plots, name)(*found, path)
    print(f'Wrote {path}')


def write_json(path: Path | None, found: dict) -> None:
    """Write what a tool has found, where a file was asked for.

    Args:
        path (Path, optional): Its folder is made where there is none.
        found (dict): Plain data.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + '\n')
    print(f'Wrote {path}')
