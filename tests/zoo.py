"""What is swept: every distinct backbone, neck and head of a package."""
import dataclasses
import functools
import importlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, Registry
from torch import Tensor, nn

from tests.oracle import randomize

ROLES = ('backbone', 'neck', 'head')
# First weights, losses and what is done with the outputs.
NO_ARCHITECTURE = ('init_cfg', 'pretrained', 'train_cfg', 'test_cfg',
                   'bbox_coder')
# What a head makes several of, each with settings of its own.
COPIED = ('separate_head', )


@dataclasses.dataclass
class Part:
    """A backbone, a neck or a head, as a config writes it.

    Attributes:
        package (str): The package of the config, ``'mmdet'`` for one.
        role (str): One of ``ROLES``.
        settings (dict): What builds it.
        source (str): The first of the package's configs that holds it.
        skeleton (nn.Module, optional): The module with nothing in its
            parameters, to look at. :func:`collect` puts it here.
    """

    package: str
    role: str
    settings: dict
    source: str
    skeleton: nn.Module | None = None

    @property
    def type(self) -> str:
        """Name of the class."""
        return self.settings['type']

    @property
    def size(self) -> int:
        """How many numbers its parameters have, once it has a skeleton."""
        return sum(p.numel() for p in self.skeleton.parameters())

    def __str__(self) -> str:
        return f'{self.type} ({self.role} in {self.source})'


class Zoo(NamedTuple):
    """What :func:`collect` finds.

    Attributes:
        normalized (list[Part]): The parts with running statistics that
            differ in architecture, the smallest first.
        missing (dict[str, Exception]): Configs that cannot be read and parts
            that cannot be built, each with the reason.
    """

    normalized: list[Part]
    missing: dict[str, Exception]


@functools.cache
def collect(package: str,
            roles: tuple[str, ...] = ROLES,
            sources: tuple[str, ...] | None = None) -> Zoo:
    """Gather the parts of the configs that a package is installed with.

    Args:
        package (str): As it is imported.
        roles (tuple[str, ...]): Which parts to gather.
        sources (tuple[str, ...], optional): Paths of configs below the
            package's folder of them. Defaults to None: all.
    """
    root = Path(importlib.import_module(package).__file__).parent
    root = root / '.mim' / 'configs'
    parts: dict[str, Part] = {}
    missing = {}
    if sources is None:
        sources = tuple(str(path.relative_to(root))
                        for path in root.rglob('*.py'))
    for source in sorted(sources, key=lambda path: (_is_base(path), path)):
        try:
            config = Config.fromfile(root / source,
                                     import_custom_modules=False)
        except Exception as error:  # a config is code
            missing[source] = error.with_traceback(None)
            continue
        scope = config.get('default_scope') or package
        scope = None if scope == package else dict(_scope_=scope)
        for role, settings in _parts(config.get('model'), roles, scope=scope):
            architecture = json.dumps([role, _architecture(settings)])
            parts.setdefault(architecture,
                             Part(package, role, settings, source))
    normalized = []
    for part in parts.values():
        try:
            skeleton = _skeleton(part)
        except Exception as error:  # stock code: whatever it lacks here
            if not _is_base(part.source):
                missing[str(part)] = error.with_traceback(None)
            continue
        if norms(skeleton):
            part.skeleton = skeleton
            normalized.append(part)
    normalized.sort(key=lambda part: part.size)
    return Zoo(normalized, missing)


def sample(parts: Sequence[Part]) -> list[Part]:
    """The first parts in which the classes of their modules occur."""
    seen: set[type] = set()
    chosen = []
    for part in parts:
        classes = {type(module) for module in part.skeleton.modules()}
        if not classes <= seen:
            chosen.append(part)
            seen |= classes
    return chosen


def _is_base(source: str) -> bool:
    """Whether a config is there for others, and may leave settings open."""
    return '_base_' in source


def _parts(config: Any, roles: tuple[str, ...], key: str = '',
           scope: dict | None = None) -> Iterator[tuple[str, dict]]:
    """Backbones, necks, and heads that are not made of heads themselves."""
    if isinstance(config, (list, tuple)):
        for item in config:
            yield from _parts(item, roles, key, scope)
    elif isinstance(config, dict):
        if '_scope_' in config:
            scope = dict(_scope_=config['_scope_'])
        role = key.rpartition('_')[2]
        inner = [
            part for name, value in config.items() if name not in COPIED
            for part in _parts(value, roles, name, scope)
        ]
        whole = role in roles and not (role == 'head' and inner)
        if whole and 'type' in config:
            yield role, {**config, **(scope or {})}
        else:
            yield from inner


def _architecture(settings: Any) -> Any:
    """What is left of settings without those that shape no module."""
    if isinstance(settings, (list, tuple)):
        return [_architecture(item) for item in settings]
    if isinstance(settings, dict):
        return {
            key: _architecture(value)
            for key, value in sorted(settings.items())
            if key not in NO_ARCHITECTURE and not key.startswith('loss')
        }
    return settings


@functools.cache
def registry(package: str) -> Registry:
    """The models of a package.

    Raises:
        ImportError: If the package, or something that it needs, is missing.
    """
    importlib.import_module(f'{package}.utils').register_all_modules(
        init_default_scope=False)
    return importlib.import_module(f'{package}.registry').MODELS


def _skeleton(part: Part) -> nn.Module:
    # Constructors read the rates of dropped paths from such a tensor.
    linspace = functools.partial(torch.linspace, device='cpu')
    try:
        with torch.device('meta'), mock.patch('torch.linspace', linspace):
            return _module(part)
    except NotImplementedError:  # its constructor copies what it has built
        return _module(part).to('meta')


def _without_weights(settings: Any) -> Any:
    """A copy of settings, for a constructor to change, with no download."""
    if isinstance(settings, (list, tuple)):
        return type(settings)(map(_without_weights, settings))
    if isinstance(settings, dict):
        return type(settings)({
            key: _nothing(value) if key.endswith('pretrained') else
            _without_weights(value) for key, value in settings.items()
        })
    return settings


def _nothing(pretrained: Any) -> bool | None:
    return False if isinstance(pretrained, bool) else None


def _module(part: Part) -> nn.Module:
    settings = _without_weights(part.settings)
    settings.pop('init_cfg', None)
    models = registry(part.package)
    with DefaultScope.overwrite_default_scope(part.package):
        module = models.build(settings)
    # The forward of CondInst's mask heads takes boxes matched to objects;
    # their normalizations sit in this module, which takes features.
    return getattr(module, 'mask_feature_head', module)


def norms(module: nn.Module) -> dict[str, nn.Module]:
    """The modules with running statistics, of whatever class, by name."""
    return {
        name: child
        for name, child in module.named_modules()
        if getattr(child, 'running_mean', None) is not None
    }


def build(part: Part) -> nn.Module:
    """Build a part in float64, the same one at every call.

    It is in train mode but for its normalizations. No parameter is left as
    it starts: the offsets of a deformable convolution would be zero.
    """
    module = _module(part).double()
    module.train()
    for norm in norms(module).values():
        norm.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            bound = 0.5
            if parameter.dim() > 1:
                bound = parameter[0].numel()**-0.5
            parameter.uniform_(-bound, bound)
        for child in module.modules():
            if hasattr(child, 'weight_gamma'):  # ConvAWS2d's, pretrained
                fan_in = child.weight[0].numel()
                child.weight_gamma.fill_(fan_in**-0.5)
                child.weight_beta.uniform_(-1 / fan_in, 1 / fan_in)
    return randomize(module)


def inputs(part: Part, module: nn.Module, size: int) -> tuple:
    """Random arguments for the forward of a part.

    Args:
        part (Part): The part.
        module (nn.Module): It, built.
        size (int): Height and width of the image, in pixels.
    """
    torch.manual_seed(1)
    channels = part.settings.get('in_channels')
    if part.role == 'backbone':
        return maps([channels or 3], size)
    if part.role == 'neck':
        # YOLOV3Neck lists the deepest first, and takes it last.
        channels = sorted(_as_list(channels))
        image = maps([3], size) if part.type == 'RFP' else ()
        return image + maps(channels, size // 4),
    return _head_inputs(module, channels, size)


def _head_inputs(head: nn.Module, channels: Any, size: int) -> tuple:
    if channels is None:
        channels = next(m.in_channels for m in head.modules()
                        if isinstance(m, nn.Conv2d))
    levels = _levels(head)
    if levels is not None:
        if isinstance(channels, int):
            channels = [channels] * levels
        return maps(channels, size // 4),
    roi_size = _as_list(getattr(head, 'roi_feat_size', 14))[0]
    return tuple(
        torch.randn(2, channels, dtype=torch.float64) if name ==
        'proposal_feat' else maps([channels], roi_size)[0]
        for name in inspect.signature(head.forward).parameters)


def _levels(head: nn.Module) -> int | None:
    """How many feature maps a head takes, None where it takes RoIs."""
    if hasattr(head, 'prior_generator'):
        return head.prior_generator.num_levels
    if hasattr(head, 'end_level'):
        return head.end_level + 1
    return getattr(head, 'num_feat_levels', None)


def maps(channels: Sequence[int], size: int) -> tuple[Tensor, ...]:
    """Feature maps of a batch, each half as large as the one before.

    Two images: of one, torch 2.13's own BatchNorm gives wrong gradients on
    the CPU where a transposed tensor is viewed as a map, as in MSCAN.
    """
    sizes = [max(size >> level, 1) for level in range(len(channels))]
    return tuple(
        torch.randn(2, c, s, s, dtype=torch.float64)
        for c, s in zip(channels, sizes))


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
