"""Training under ``torch.compile`` against stock without it."""
import pytest
import torch
from mmengine.runner import FlexibleRunner
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from mmtune import turn_on
from mmtune.analysis import saved_bytes
from tests.oracle import assert_equal_steps, runs, step, stock_copy
from tests.toy import TUNE, build_runner, conv_bns, loader, losses


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def image(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def pair():
    """Stock, and Tune mode with its compiled forward."""
    stock = conv_bns()
    model = stock_copy(stock)
    turn_on(model)
    counter = CompileCounterWithBackend('aot_eager')
    return stock, model, counter


def test_dynamic_shapes_take_one_graph(pair):
    stock, model, counter = pair
    compiled = torch.compile(
        model, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 8, 10), (4, 3, 9, 12), (5, 3, 17, 7)):
        x = image(*shape)
        assert_equal_steps(
            step(stock, x), step(model, x, lambda _, x: compiled(x)))
    assert counter.frame_count == 1
    assert runs(model) == ['fused'] * 2


CHANGES = {
    'a step of SGD': lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
    'statistics loaded': lambda m: m.load_state_dict(
        {k: v * 1.5 for k, v in m.state_dict().items()}),
    'statistics through .data': lambda m: m[1].running_var.data.mul_(3),
    'weights through .data': lambda m: m[0].weight.data.mul_(2),
    'train mode and back': lambda m: m.train()(image(2, 3, 8, 8)) is m.eval(),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_nothing_is_baked_in(change, pair):
    stock, model, counter = pair
    x = image(2, 3, 8, 8)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_equal_steps(
            step(stock, x), step(model, x, lambda _, x: compiled(x)))
        for one in (stock, model):
            change(one)
    assert counter.frame_count == 1


def test_modes_and_gradients_switched(pair):
    """Each state is another graph, none with a break."""
    stock, model, counter = pair
    x = image(2, 3, 8, 8)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for training, learns in ((False, True), (True, True), (False, False),
                             (True, True), (False, True)):
        for one in (stock, model):
            one.train(training).requires_grad_(learns)
        assert_equal_steps(
            step(stock, x), step(model, x, lambda _, x: compiled(x)))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), stock(x))
            stock.load_state_dict(model.state_dict())
        assert runs(model) == ['train mode' if training else 'fused'] * 2


def test_a_parametrization_with_a_state_runs_once(pair):
    stock, model, counter = pair
    for one in (stock, model):
        torch.manual_seed(0)
        spectral_norm(one[0]).train()
    turn_on(model)
    x = image(2, 3, 8, 8)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_equal_steps(
            step(stock, x), step(model, x, lambda _, x: compiled(x)))
        assert runs(model) == ['fused'] * 2


@pytest.mark.small_maps
def test_no_map_is_small(pair):
    """Sizes on both sides of where a fold begins to pay uncompiled."""
    stock, model, counter = pair
    compiled = torch.compile(
        model, backend=counter, fullgraph=True, dynamic=True)
    for size in (8, 96, 9, 97):
        x = image(2, 3, size, size + 3)
        assert_equal_steps(
            step(stock, x), step(model, x, lambda _, x: compiled(x)))
        assert runs(model) == ['fused'] * 2
    assert counter.frame_count == 1


def test_checkpoint_inside(pair):
    stock, model, counter = pair

    def call(model, x):
        return checkpoint(model, x, use_reentrant=False)

    def compiled(**options):
        return torch.compile(
            lambda x: call(model, x), backend=counter, **options)

    x = image(2, 3, 8, 8)
    assert_equal_steps(
        step(stock, x, call), step(model, x, lambda _, x: compiled()(x)))
    assert runs(model) == ['fused'] * 2
    # A limit that docs/en/method.md tells of.
    with pytest.raises(torch._dynamo.exc.Unsupported, match='side effect'):
        compiled(fullgraph=True)(x)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_outside_and_inside(dtype):
    model = conv_bns(torch.float32)
    turn_on(model)
    x = image(2, 3, 8, 8).float()

    def inside(x):
        with torch.autocast('cpu', dtype):
            return model(x)

    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    compiled_inside = torch.compile(
        inside, backend='aot_eager', fullgraph=True)

    def outside(model, x):
        with torch.autocast('cpu', dtype):
            return compiled(x).float()

    expected = step(model, x, lambda _, x: inside(x).float())
    tolerance = 8 * torch.finfo(dtype).eps
    for call in (outside, lambda _, x: compiled_inside(x).float()):
        assert_equal_steps(expected, step(model, x, call), tolerance)
        assert runs(model) == ['fused'] * 2


@pytest.fixture
def run(tmp_path):
    """Runs a Runner with Tune mode compiled, and one with neither."""

    def run(build, compile):
        stock = build(tmp_path / 'stock')
        stock.train()
        tuned = build(tmp_path / 'tuned', default_hooks=TUNE, compile=compile)
        tuned.train()
        assert losses(tuned) == pytest.approx(losses(stock), rel=1e-5)
        assert runs(tuned.model) == ['fused', 'fused', 'train mode']
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0

    return run


@pytest.mark.slow
def test_compile_key_of_mmengine(run):
    """All of `train_step`, whose backward breaks the graph."""
    run(build_runner, dict(backend='aot_eager', dynamic=True))


@pytest.mark.slow
def test_compile_true_of_mmengine(run):
    """Inductor: it asks for a C++ compiler, as installing mmcv does."""
    run(build_runner, True)


@pytest.mark.parametrize('options', [
    dict(target='forward', fullgraph=True), dict(target='train_step'), {}
])
def test_compile_argument_of_the_flexible_runner(options, run):
    """It takes none from a config: `from_cfg` drops the key."""

    def build(work_dir, **more):
        return FlexibleRunner(
            model=dict(type='ToyClassifier'),
            work_dir=str(work_dir),
            train_dataloader=loader(),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
            custom_hooks=[dict(type='RecordHook')],
            experiment_name=str(work_dir),
            randomness=dict(seed=0),
            **more)

    run(build, dict(backend='aot_eager', **options))


class Residual(nn.Module):
    """Weights that are large beside the maps, and an activation of choice."""

    def __init__(self, act):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c, 64, 3, padding=1, bias=False) for c in (3, 64, 64))
        self.bns = nn.ModuleList(nn.BatchNorm2d(64) for _ in self.convs)
        self.act = act

    def forward(self, x):
        x = self.act(self.bns[0](self.convs[0](x)))
        y = self.act(self.bns[1](self.convs[1](x)))
        return self.act(self.bns[2](self.convs[2](y)) + x)


@pytest.mark.parametrize('act, dynamic, amp', [
    (nn.ReLU(), False, False),
    (nn.SiLU(), True, False),
    (nn.ReLU(), True, True),
    (nn.SiLU(), False, True),
])
def test_keeps_what_compiled_deploy_keeps(act, dynamic, amp):
    """The partitioner would else keep the folded weights for backward."""
    kept = {}
    for mode in ('Eval', 'Tune', 'Deploy'):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Residual(act).eval()
        if mode != 'Eval':
            turn_on(model, mode)
        compiled = torch.compile(
            model,
            backend='aot_eager_decomp_partition',
            fullgraph=True,
            dynamic=dynamic)
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            with saved_bytes(model) as saved:
                output = compiled(torch.randn(2, 3, 8, 8))
            kept[mode] = saved.total
        output.float().sum().backward()
    assert kept['Tune'] <= 1.02 * kept['Deploy']
    assert kept['Tune'] <= kept['Eval']
