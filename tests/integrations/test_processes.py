"""Two processes on gloo: DDP, SyncBatchNorm and FSDP against stock in both.

tests/models/test_distributed.py compares them with one process. A process
takes seconds to start, so that each test goes through a table in there.
"""
import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmtune import turn_on
from mmtune.api import latest_runs
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy
from tests.processes import in_processes
from tests.toy import TUNE, ToyClassifier, build_runner, conv_bns, losses


def batch(rank):
    torch.manual_seed(10 + rank)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


@contextlib.contextmanager
def case(name):
    """Name the case in which something fails."""
    try:
        yield
    except BaseException as error:
        error.add_note(f'in the case {name!r}')
        raise


class Branches(nn.Module):
    """A stem and two branches, of which a forward takes one or none."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bns()
        self.left, self.right = (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            for _ in range(2))
        randomize(self).double().eval()
        self.way = 'both'

    def forward(self, x):
        y = self.stem(x)
        if self.way == 'checkpoint':
            return self.left(checkpoint(self.right, y, use_reentrant=True))
        if self.way == 'both':
            return self.right(self.left(y))
        return y if self.way == 'none' else getattr(self, self.way)(y)


@MODELS.register_module()
class SyncToy(ToyClassifier):
    """The toy with SyncBatchNorm, as configs for eight GPUs have it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.SyncBatchNorm.convert_sync_batchnorm(self)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for module in self.backbone:
            if isinstance(module, _BatchNorm):
                module.train(mode and not self.norm_eval)
        return self


def same_everywhere(tensors):
    for tensor in tensors:
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(tensor, first)


# --------------------------------------------------------------------------
# DDP
# --------------------------------------------------------------------------

# Options, the way of each rank, and a factor by which the statistics of
# rank 1 differ.
DDP = {
    'plain': ({}, ['both', 'both'], 1),
    'find_unused_parameters': (
        dict(find_unused_parameters=True), ['left', 'left'], 1),
    'other unused parameters on each rank': (
        dict(find_unused_parameters=True), ['left', 'right'], 1),
    'all branches unused on a rank': (
        dict(find_unused_parameters=True), ['none', 'both'], 1),
    'static_graph': (dict(static_graph=True), ['both', 'both'], 1),
    'static_graph with unused parameters': (
        dict(static_graph=True), ['right', 'right'], 1),
    'static_graph with checkpoints': (
        dict(static_graph=True), ['checkpoint', 'checkpoint'], 1),
    'broadcast_buffers': (
        dict(broadcast_buffers=True), ['both', 'both'], 3),
    'no broadcast_buffers': (
        dict(broadcast_buffers=False), ['both', 'both'], 3),
    'small buckets, viewed': (
        dict(bucket_cap_mb=1e-4, gradient_as_bucket_view=True),
        ['both', 'both'], 1),
}


def _ddp(rank):
    x = batch(rank)
    for name, (options, ways, factor) in DDP.items():
        for wrapped_first in (False, True):
            with case(f'{name}, wrapped first: {wrapped_first}'):
                stock = Branches()
                model = stock_copy(stock)
                stock.way = model.way = ways[rank]
                if not wrapped_first:
                    turn_on(model)
                stock, model = (
                    DistributedDataParallel(m, **options)
                    for m in (stock, model))
                if wrapped_first:
                    turn_on(model.module)
                _train(rank, stock, model, x, factor)


def _train(rank, stock, model, x, factor):
    optimizers = [torch.optim.SGD(m.parameters(), 0.05)
                  for m in (stock, model)]
    for i in range(3):
        if i == 1 and rank == 1:
            for one in (stock, model):
                one.module.stem[1].running_var *= factor
        assert_equal_steps(step(stock, x), step(model, x))
        for optimizer in optimizers:
            optimizer.step()
        ran = dict(latest_runs(model.module))
        assert 'fused' in ran.values() and 'stock' not in ran.values(), ran
    same_everywhere(model.parameters())
    with stock.no_sync(), model.no_sync():
        assert_equal_steps(step(stock, x), step(model, x))
    assert_equal_steps(step(stock, x), step(model, x))


def _ddp_compiled(rank):
    x = batch(rank)
    stock = Branches()
    model = stock_copy(stock)
    turn_on(model)
    stock, model = (DistributedDataParallel(m) for m in (stock, model))
    compiled = torch.compile(model, backend='aot_eager')
    for _ in range(2):
        assert_equal_steps(
            step(stock, x), step(model, x, lambda _, x: compiled(x)))
    assert set(runs(model)) == {'fused'}


@pytest.mark.slow
@pytest.mark.parametrize('function', [_ddp, _ddp_compiled])
def test_ddp(function):
    in_processes(function)


# --------------------------------------------------------------------------
# SyncBatchNorm
# --------------------------------------------------------------------------


def _sync_batch_norm(rank):
    x = batch(rank)
    for converted_first in (True, False):
        with case(f'converted first: {converted_first}'):
            stock = conv_bns()
            model = stock_copy(stock)
            if not converted_first:
                turn_on(model)
            stock, model = (nn.SyncBatchNorm.convert_sync_batchnorm(m)
                            for m in (stock, model))
            # The new BNs are none that turn_on has seen.
            assert_equal_steps(step(stock, x), step(model, x))
            turn_on(model)
            assert isinstance(model[1], nn.SyncBatchNorm)
            assert_equal_steps(step(stock, x), step(model, x))
            assert runs(model) == ['fused'] * 2
            for one in (stock, model):
                one.train()
                with pytest.raises(ValueError, match='to be on GPU'):
                    one(x)
                one.eval()
            stock.load_state_dict(model.state_dict())
            assert_equal_steps(step(stock, x), step(model, x))


@pytest.mark.slow
def test_sync_batch_norm():
    """In eval mode: in train mode, and in DDP, torch wants it on a GPU."""
    in_processes(_sync_batch_norm)


@pytest.mark.parametrize('options', [
    dict(model=dict(type='mmtune.TuneModeModel',
                    architecture=dict(type='SyncToy'))),
    dict(model=dict(type='SyncToy'), default_hooks=TUNE),
], ids=['TuneModeModel', 'TuneModeHook'])
def test_sync_batch_norm_in_one_process(options, tmp_path):
    """A Runner that is not distributed puts BatchNorms in their place."""
    stock = build_runner(tmp_path / 'stock', model=dict(type='SyncToy'))
    tuned = build_runner(tmp_path / 'tuned', **options)
    for runner in (stock, tuned):
        runner.train()
        assert not any(isinstance(module, nn.SyncBatchNorm)
                       for module in runner.model.modules())
    assert losses(tuned) == pytest.approx(losses(stock), rel=1e-5)
    assert runs(tuned.model) == ['fused', 'fused', 'train mode']


# --------------------------------------------------------------------------
# FSDP
# --------------------------------------------------------------------------

def wrapped(*types):
    return dict(auto_wrap_policy=ModuleWrapPolicy(types))


# Options, and how blocks run. A layer in a wrapper of its own runs as stock.
FSDP = {
    'whole': ({}, 'fused'),
    'flat parameters': (dict(use_orig_params=False), 'fused'),
    'not sharded': (
        dict(sharding_strategy=ShardingStrategy.NO_SHARD), 'fused'),
    'gradients sharded alone': (
        dict(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP), 'fused'),
    'blocks': (wrapped(nn.Sequential), 'fused'),
    'blocks, flat parameters': (
        dict(wrapped(nn.Sequential), use_orig_params=False), 'fused'),
    'layers': (wrapped(nn.Conv2d, nn.BatchNorm2d), 'stock'),
    'layers, flat parameters': (
        dict(wrapped(nn.Conv2d, nn.BatchNorm2d), use_orig_params=False),
        'stock'),
    'BNs': (wrapped(nn.BatchNorm2d), 'stock'),
    'convolutions': (wrapped(nn.Conv2d), 'stock'),
    # A BN in float32 in the middle of it would fail in stock on the CPU.
    'bfloat16': (dict(mixed_precision=MixedPrecision(
        torch.bfloat16, torch.float32, torch.bfloat16)), 'fused'),
}


def sharded_step(model, x):
    """As `step`, by the shards: a state_dict would gather them."""
    model.zero_grad()
    output = model(x)
    output.to(x.dtype).square().mean().backward()
    result = {'output': output.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        result[name] = getattr(gradient, 'to_local', lambda g=gradient: g)()
    return result


def both_sharded(wrap, options, when, dtype):
    for tuned in (False, True):
        model = Branches().to(dtype)
        if tuned and when == 'before':
            turn_on(model)
        model = wrap(model, **options)
        if tuned and when == 'after':
            turn_on(model)
        yield model


def compare_sharded(rank, wrap, options, when, dtype=torch.float64):
    """Three steps of each, and how the blocks of the second ran."""
    x = batch(rank).to(dtype)
    stock, model = both_sharded(wrap, options, when, dtype)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05)
                  for m in (stock, model)]
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    for _ in range(3):
        assert_equal_steps(
            sharded_step(stock, x), sharded_step(model, x), tolerance)
        for optimizer in optimizers:
            optimizer.step()
    return set(latest_runs(model).values())


def _fsdp(rank):
    wrap = functools.partial(
        FullyShardedDataParallel, device_id=torch.device('cpu'))
    for name, (options, expected) in FSDP.items():
        options = dict(dict(use_orig_params=True), **options)
        dtype = torch.float32 if name == 'bfloat16' else torch.float64
        for when in ('before', 'after'):
            with case(f'{name}, turned on {when}'):
                if when == 'after' and expected == 'stock':
                    with pytest.raises(ValueError, match='nothing to put'):
                        compare_sharded(rank, wrap, options, when, dtype)
                else:
                    # The wrapper stands in the layer's place.
                    ran = 'replaced' if expected == 'stock' else expected
                    assert compare_sharded(
                        rank, wrap, options, when, dtype) == {ran}


@pytest.mark.slow
def test_fsdp():
    """The first generation, which MMEngine builds on."""
    in_processes(_fsdp)


def sharded(model, units, **options):
    mesh = init_device_mesh('cpu', (2, ))
    for module in [*units(model), model]:
        fully_shard(module, mesh=mesh, **options)
    return model


def layers(*types):
    return dict(units=lambda model: [
        module for module in model.modules() if isinstance(module, types)])


FULLY_SHARD = {
    'whole': (layers(), 'fused'),
    'blocks': (layers(nn.Sequential), 'fused'),
    'blocks, kept whole after the forward': (
        dict(layers(nn.Sequential), reshard_after_forward=False), 'fused'),
    'layers': (layers(nn.Conv2d, nn.BatchNorm2d), 'stock'),
    'convolutions': (layers(nn.Conv2d), 'stock'),
    'BNs': (layers(nn.BatchNorm2d), 'stock'),
}


def _fully_shard(rank):
    for name, (options, expected) in FULLY_SHARD.items():
        for when in ('before', 'after'):
            with case(f'{name}, turned on {when}'):
                assert compare_sharded(
                    rank, sharded, options, when) == {expected}


@pytest.mark.slow
def test_fully_shard():
    """The second generation, of DTensors."""
    in_processes(_fully_shard)


# --------------------------------------------------------------------------
# MMEngine's runners
# --------------------------------------------------------------------------

# MMEngine would give the rank for the device, which means a GPU. A full
# state_dict of FSDP on the CPU ends the process, in stock as well.
RUNS = {
    'FSDP': (True, dict(strategy=dict(
        type='FSDPStrategy',
        state_dict_cfg='local',
        model_wrapper=dict(
            type='MMFullyShardedDataParallel', device_id='cpu')))),
    'DDP of the FlexibleRunner': (True, dict(strategy=dict(
        type='DDPStrategy',
        model_wrapper=dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            static_graph=True)))),
    'DDP': (False, dict(model_wrapper_cfg=dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=True,
        find_unused_parameters=True))),
}


def _runners(rank, work_dir):
    results = {}
    for name, (flexible, options) in RUNS.items():
        for hooks in ({}, TUNE):
            with case(name):
                runner = build_runner(
                    f'{work_dir}/{name}{len(hooks)}',
                    flexible,
                    launcher='pytorch',
                    env_cfg=dict(dist_cfg=dict(backend='gloo', timeout=60)),
                    experiment_name=f'{name}{len(hooks)}',
                    default_hooks=hooks,
                    **options)
                runner.train()
                results.setdefault(name, []).append(
                    (losses(runner), runs(runner.model)))
    return results


@pytest.mark.slow
def test_runners(tmp_path):
    for results in in_processes(_runners, str(tmp_path), init=False):
        assert results.keys() == RUNS.keys()
        for (expected, _), (actual, ran) in results.values():
            assert actual == pytest.approx(expected, rel=1e-5)
            assert len(actual) == 4
            assert ran == ['fused', 'fused', 'train mode']
