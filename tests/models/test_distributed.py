"""Two processes on gloo against one process."""
import gc
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed, nn

from mmtune import turn_on
from mmtune.api import latest_runs
from mmtune.behaviours.activation import activation_runs
from mmtune.models import TuneModeDistributedDataParallel
from tests import toy
from tests.oracle import randomize
from tests.processes import in_processes


def batch():
    torch.manual_seed(3)
    return torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 0, 1])


def build():
    return toy.ToyClassifier().double().eval()


def gradients(model, inputs, labels):
    for _ in range(2):
        model.zero_grad()
        model(inputs, labels, mode='loss')['loss'].backward()
    return {k: p.grad.clone() for k, p in model.named_parameters()}


def _ddp(rank, **options):
    model = build()
    turn_on(model)
    return _step(
        rank, model, nn.parallel.DistributedDataParallel(model, **options))


def _ddp_wrapped_first(rank):
    """As the Hook finds it."""
    model = build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    turn_on(model)
    return _step(rank, model, wrapped)


def _step(rank, model, wrapped):
    inputs, labels = batch()
    half = slice(2 * rank, 2 * rank + 2)
    grads = gradients(wrapped, inputs[half], labels[half])
    assert set(latest_runs(model).values()) == {'fused'}
    return {k.removeprefix('module.'): v for k, v in grads.items()}


def _wrapper(rank):
    inputs, labels = batch()
    wrapped = MODEL_WRAPPERS.build(
        dict(
            type='mmtune.TuneModeDistributedDataParallel',
            module=build(),
            modules=['backbone'],
            device_ids=[rank]))
    stock = build()
    assert list(wrapped.state_dict()) == list(stock.state_dict())
    wrapped.load_state_dict(stock.state_dict(), strict=True)
    assert wrapped.backbone is wrapped.module.backbone
    with pytest.raises(AttributeError):
        _ = wrapped.bakbone
    expected = stock.val_step(dict(inputs=inputs, labels=labels))
    for step in (wrapped.val_step, wrapped.test_step):
        assert torch.equal(
            step(dict(inputs=inputs, labels=labels)), expected)
    return _step(rank, wrapped.module, wrapped)


WAYS = {
    'plain': _ddp,
    'wrapped first': _ddp_wrapped_first,
    'unused parameters': partial(_ddp, find_unused_parameters=True),
    'static graph': partial(_ddp, static_graph=True),
    "mmtune's wrapper": _wrapper,
}


def _all_ways(rank):
    return {name: way(rank) for name, way in WAYS.items()}


@pytest.fixture(scope='module')
def of_two_processes():
    """Gradients of each rank, by the way to wrap the model."""
    return in_processes(_all_ways)


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS)
def test_two_processes_equal_one(way, of_two_processes):
    expected = gradients(build(), *batch())
    for found in of_two_processes:
        assert found[way].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[way][name], value, rtol=1e-10, atol=1e-12)


def _run(rank, work_dir, options):
    runner = toy.build_runner(
        Path(work_dir),
        launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        experiment_name='distributed',
        **options)
    runner.train()
    return toy.losses(runner), type(runner.model).__name__, dict(
        latest_runs(runner.model))


@pytest.mark.slow
def test_model_wrapper_cfg_of_a_runner(tmp_path):
    """The wrapper by config; MMEngine's own gives device_ids on the CPU."""
    wrapper_cfg = dict(
        type='mmtune.TuneModeDistributedDataParallel', modules=['backbone'])
    results = in_processes(
        _run, str(tmp_path), dict(model_wrapper_cfg=wrapper_cfg), init=False)
    for losses, wrapper, runs in results:
        assert wrapper == 'TuneModeDistributedDataParallel'
        assert len(losses) == 4
        assert set(runs.values()) == {'fused'}
    state = torch.load(tmp_path / 'epoch_2.pth')['state_dict']
    toy.ToyClassifier().load_state_dict(state, strict=True)


@pytest.mark.parametrize('arguments, ran', [
    ({}, {'backbone.2': 'one map'}), (dict(activations=False), {})])
def test_activations(arguments, ran, tmp_path):
    stock = toy.ToyClassifier(act='SiLU').double().eval()
    expected = gradients(stock, *batch())
    distributed.init_process_group(
        'gloo', f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        found = gradients(
            TuneModeDistributedDataParallel(stock, **arguments), *batch())
        # A wrapper that outlives its group can hang when it is freed.
        gc.collect()
    finally:
        distributed.destroy_process_group()
    assert activation_runs(stock) == ran
    for name, value in expected.items():
        torch.testing.assert_close(found[f'module.{name}'], value)


def test_deploy_is_refused():
    with pytest.raises(ValueError, match="cannot have mode 'Deploy'"):
        TuneModeDistributedDataParallel(randomize(build()), mode='Deploy')
