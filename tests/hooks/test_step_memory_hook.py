import contextlib

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from mmtune import native
from mmtune.analysis import peak_bytes
from mmtune.api import turn_on
from mmtune.hooks import StepMemoryHook, step_memory_hook
from mmtune.hooks.step_memory_hook import _spared_by_blocks
from tests import toy

MIB = 2**20
# Outputs of the blocks of the toy's backbone, for its batch of two.
SPARED = 4 * 2 * (8 * 6 * 6 + 8 * 4 * 4)


def hooks(interval):
    return [
        dict(type='RecordHook'),
        dict(type='mmtune.StepMemoryHook', interval=interval)
    ]


def history(runner, name):
    return runner.message_hub.get_scalar(f'train/{name}').data[0]


@pytest.mark.parametrize('tune', [True, False])
@pytest.mark.parametrize('interval, steps', [(3, [0, 2, 5]), (1, range(8))])
def test_measures_each_interval(interval, steps, tune, tmp_path):
    options = dict(
        default_hooks=toy.TUNE,
        efficient_conv_bn_eval=dict(modules=['backbone'])) if tune else {}
    runner = toy.build_runner(
        tmp_path, custom_hooks=hooks(interval), **options)
    runner.train()
    assert len(history(runner, 'peak_memory')) == len(steps)
    assert set(history(runner, 'spared_memory')) == {
        SPARED / MIB if tune else 0
    }
    plain = toy.build_runner(tmp_path, **options)
    plain.train()
    # Where operators are counted the native node runs by operators.
    rounding = 1e-5 if tune and native.node() else 0
    assert toy.losses(runner) == pytest.approx(
        toy.losses(plain), rel=rounding, abs=0)


def test_activations_spare_too(tmp_path):
    runner = toy.build_runner(
        tmp_path, custom_hooks=hooks(3), default_hooks=toy.TUNE,
        model=dict(type='ToyClassifier', act='SiLU'),
        efficient_conv_bn_eval=dict(modules=['backbone']))
    runner.train()
    by_activation = 4 * 2 * 8 * 6 * 6
    assert set(history(runner, 'spared_memory')) == {
        (SPARED + by_activation) / MIB
    }
    assert 'MiB and activations 0.0 MiB that' in toy.logged(runner)


def test_measuring_changes_nothing_in_python(tmp_path, monkeypatch):
    monkeypatch.setattr(native, 'node', lambda: None)
    test_measures_each_interval(3, [0, 2, 5], True, tmp_path)


def test_the_log_says_at_the_start_what_is_spared(tmp_path):
    runner = toy.build_runner(
        tmp_path, custom_hooks=hooks(3), default_hooks=toy.TUNE,
        efficient_conv_bn_eval=dict(modules=['backbone']))
    runner.train()
    said = f'fused blocks spare it {SPARED / MIB:.1f} MiB'
    assert toy.logged(runner).count(said) == 1


def test_what_begins_in_mid_run_is_spared_from_then_on(tmp_path):
    runner = toy.build_runner(
        tmp_path, custom_hooks=hooks(1), default_hooks=toy.TUNE,
        efficient_conv_bn_eval=dict(modules=['backbone'], begin=1))
    for module in runner.model.modules():
        if hasattr(module, 'norm_eval'):
            module.norm_eval = False
    runner.train()
    spared = list(history(runner, 'spared_memory'))
    half = len(spared) // 2
    assert spared == [0] * half + [SPARED / MIB] * half


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_checkpoint_is_counted_once(reentrant):
    from torch.utils.checkpoint import checkpoint
    model = toy.conv_bns(torch.float32).eval()
    turn_on(model)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    model(x)

    def step():
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()

    step()
    with _spared_by_blocks(model) as spared:
        step()
    with _spared_by_blocks(model) as plain:
        model(x)
    assert sum(spared) == (0 if reentrant else sum(plain))
    assert sum(plain) > 0


def test_peak_is_that_of_the_step(tmp_path):
    runner = toy.build_runner(
        tmp_path,
        custom_hooks=hooks(1),
        train_cfg=dict(by_epoch=True, max_epochs=1))
    runner.train()
    wrapper = runner.optim_wrapper
    for data in runner.train_dataloader:
        with peak_bytes() as memory:
            runner.model.train_step(data, wrapper)
    assert history(runner, 'peak_memory')[-1] == pytest.approx(
        memory.peak / MIB)


def test_measures_where_the_model_is(tmp_path, monkeypatch):
    runner = toy.build_runner(tmp_path, custom_hooks=hooks(1))
    asked = []

    @contextlib.contextmanager
    def record(device):
        asked.append(device.type)
        yield lambda: 3 * MIB

    monkeypatch.setattr(step_memory_hook, 'peak_on', record)
    runner.train()
    assert set(asked) == {'cpu'}
    assert set(history(runner, 'peak_memory')) == {3}


def test_a_compiled_run_is_left_alone(tmp_path):
    options = dict(compile=dict(backend='eager'), default_hooks=toy.TUNE)
    runner = toy.build_runner(tmp_path, custom_hooks=hooks(1), **options)
    runner.train()
    assert toy.logged(runner).count('measures nothing in a run with') == 1
    assert 'train/peak_memory' not in runner.message_hub.log_scalars
    plain = toy.build_runner(tmp_path, **options)
    plain.train()
    assert toy.losses(runner) == toy.losses(plain)


def test_every_backend_of_the_visualizer(tmp_path):
    runner = toy.build_runner(
        tmp_path,
        custom_hooks=hooks(1),
        default_hooks=dict(toy.TUNE, logger=dict(
            type='LoggerHook', interval=1)),
        visualizer=dict(
            type='Visualizer',
            vis_backends=[dict(type='TensorboardVisBackend')]))
    runner.train()
    assert 'peak_memory: ' in toy.logged(runner)
    folder = next(tmp_path.rglob('events.out.tfevents.*')).parent
    events = EventAccumulator(str(folder)).Reload()
    for name in ('peak_memory', 'spared_memory'):
        values = [event.value for event in events.Scalars(name)]
        assert len(values) == 8 and min(values) > 0


@HOOKS.register_module()
class FailOnceHook(Hook):
    """Lets the model raise in its first step."""

    def before_run(self, runner):
        forward = runner.model.forward

        def fail(*args, **kwargs):
            runner.model.forward = forward
            raise RuntimeError('the first step fails')

        runner.model.forward = fail


def test_a_step_that_raises_leaves_nothing_behind(tmp_path):
    runner = toy.build_runner(
        tmp_path,
        custom_hooks=[dict(type='FailOnceHook'), *hooks(1)])
    with pytest.raises(RuntimeError, match='the first step fails'):
        runner.train()
    assert 'train_step' not in vars(runner.model)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize('interval', [0, -1, 2.5, '10', None])
def test_mistakes(interval):
    with pytest.raises(ValueError, match='`interval` must be a positive'):
        StepMemoryHook(interval)
