"""Children of MMEngine's registries.

MMEngine imports this module by itself when a config says ``type='mmtune.X'``,
and the ``locations`` when it looks for X: no ``custom_imports`` is needed.
"""
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

from mmtune.engine.checkpoint import allow_mmengine_checkpoints

__all__ = ['HOOKS', 'MODELS', 'MODEL_WRAPPERS']

HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='mmtune', locations=['mmtune.hooks'])
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmtune',
    locations=['mmtune.models'])
MODEL_WRAPPERS = Registry(
    'model_wrapper',
    parent=MMENGINE_MODEL_WRAPPERS,
    scope='mmtune',
    locations=['mmtune.models'])

# Here, since every run with something of mmtune passes before it loads.
allow_mmengine_checkpoints()
