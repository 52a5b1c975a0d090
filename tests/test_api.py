import copy

import pytest
import torch
from torch import nn

import mmtune
from mmtune import turn_off, turn_on
from mmtune.analysis import saved_bytes
from mmtune.api import latest_runs
from mmtune.arguments import MODES
from mmtune.deploy import FoldedNorm
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy


class Net(nn.Module):
    """Backbone and head with BN, a neck with GN, and a conv without BN."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))
        self.head = nn.Sequential(
            nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return randomize(Net()).double().eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


PAIRS = [('backbone.0', 'backbone.1'), ('backbone.3', 'backbone.4'),
         ('head.0', 'head.1')]
# A GroupNorm.
OTHER = ('neck.0', 'neck.1')


def facts(model):
    """What must not change for optimizers, EMA, DDP and checkpoints."""
    return dict(
        parameters=[(name, id(p)) for name, p in model.named_parameters()],
        state=list(model.state_dict()),
        values=[v.clone() for v in model.state_dict().values()],
        modules=[name for name, _ in model.named_modules()],
        training=[m.training for m in model.modules()])


def assert_same_facts(before, after):
    values = before.pop('values'), after.pop('values')
    assert before == after
    for one, other in zip(*values):
        assert torch.equal(one, other)


@pytest.mark.parametrize('mode', ['tune', 'Tune', 'TUNE', 'tUNE'])
def test_tune_equals_stock(net, x, mode):
    stock, before = stock_copy(net), facts(net)
    report = turn_on(net, mode=mode)
    assert report.mode == 'Tune'
    assert [(r.conv, r.bn) for r in report.rewritten] == PAIRS
    assert [(r.conv, r.bn) for r in report.left_out] == [OTHER]
    assert_same_facts(before, facts(net))
    for (_, module), (_, other) in zip(net.named_modules(),
                                       stock.named_modules()):
        assert isinstance(module, type(other))
        assert type(module).__name__ == type(other).__name__
    assert_equal_steps(step(stock, x), step(net, x))
    assert runs(net) == ['fused'] * 3


def test_constants_of_the_fold_are_read_from_the_convolution(net, x):
    before = [name for name, _ in net.named_buffers()]
    turn_on(net)
    for _ in range(2):
        for name, bn in PAIRS:
            conv, norm = net.get_submodule(name), net.get_submodule(bn)
            listed = dict(conv.named_buffers('a'))
            assert set(listed) == {'a.weight_coeff', 'a.bias_delta'}
            assert not conv.state_dict().keys() & {'weight_coeff'}
            rstd = (norm.running_var + norm.eps).rsqrt()
            assert torch.allclose(conv.weight_coeff.flatten(), rstd)
            assert torch.equal(conv.bias_delta, -norm.running_mean)
            assert torch.equal(conv.bias_delta, listed['a.bias_delta'])
            assert (conv.weight * conv.weight_coeff).shape == conv.weight.shape
        # Whatever happens to the statistics.
        randomize(net, seed=5)
    assert [name for name, _ in net.named_buffers()] == before
    turn_off(net)
    assert not hasattr(conv, 'weight_coeff')
    assert not list(conv.named_buffers())


def test_turn_off_gives_stock_back(net, x):
    stock, before = stock_copy(net), facts(net)
    turn_on(net)
    net(x)
    turn_off(net)
    turn_off(net)
    assert_same_facts(before, facts(net))
    for module, other in zip(net.modules(), stock.modules()):
        assert type(module) is type(other)
        assert vars(module).keys() == vars(other).keys()
    assert_equal_steps(step(stock, x), step(net, x))


def test_twice_is_once(net, x):
    stock = stock_copy(net)
    first = turn_on(net)
    types = [type(m) for m in net.modules()]
    second = turn_on(net)
    assert first == second
    assert [type(m) for m in net.modules()] == types
    assert_equal_steps(step(stock, x), step(net, x))
    turn_off(net)
    assert [type(m) for m in net.modules()] == [
        type(m) for m in stock.modules()
    ]


@pytest.mark.parametrize('first', MODES[:3])
@pytest.mark.parametrize('second', MODES)
def test_switching_modes(net, x, first, second):
    plain, switched = net, stock_copy(net)
    turn_on(plain, second)
    turn_on(switched, first)
    turn_on(switched, second)
    assert_equal_steps(step(plain, x), step(switched, x), 0)
    assert repr(plain) == repr(switched)


@pytest.mark.parametrize('mode, training', [('Train', True), ('Eval', False)])
def test_train_and_eval_hold_every_bn(net, x, mode, training):
    stock, before = stock_copy(net), facts(net)
    report = turn_on(net, mode)
    assert {row.mode for row in report.rewritten} == {mode}
    assert [(r.conv, r.bn) for r in report.left_out] == [OTHER]
    for asked in (True, False, True):
        net.train(asked)
        stock.train(asked)
        norms = [m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.train(training)
        assert [m.training for m in net.modules()
                ] == [m.training for m in stock.modules()]
        assert_equal_steps(step(stock, x), step(net, x), 0)
    net.load_state_dict(
        dict(zip(before['state'], before['values'])))
    net.eval()
    turn_off(net)
    assert_same_facts(before, facts(net))


@pytest.mark.parametrize('mode', ['Tune', 'Eval'])
def test_norm_eval_holds_through_train_calls(net, x, mode):
    stock = stock_copy(net)
    net.train()
    turn_on(net, mode, norm_eval=True, modules='backbone')
    net.train()
    backbone, head = (
        [m.training for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
        for part in (net.backbone, net.head))
    assert backbone == [False, False] and head == [True]
    assert net.training and net.backbone[0].training
    stock.train()
    for index in (1, 4):
        stock.backbone[index].eval()
    assert_equal_steps(step(stock, x), step(net, x))
    turn_off(net)
    assert all(m.training for m in net.modules())


def test_without_norm_eval_bns_obey(net):
    turn_on(net)
    net.train()
    assert all(m.training for m in net.modules())
    net.eval()
    assert not any(m.training for m in net.modules())


def test_modules_restrict(net, x):
    stock = stock_copy(net)
    report = turn_on(net, modules=['backbone', 'neck'])
    assert [row.bn for row in report.rewritten] == ['backbone.1', 'backbone.4']
    assert [row.bn for row in report.left_out] == ['neck.1']
    assert list(latest_runs(net)) == ['backbone.1', 'backbone.4']
    assert_equal_steps(step(stock, x), step(net, x))
    turn_on(net, modules='head')
    assert list(latest_runs(net)) == ['backbone.1', 'backbone.4', 'head.1']
    turn_on(net, 'Eval', modules='backbone')
    assert list(latest_runs(net)) == ['head.1']
    assert_equal_steps(step(stock, x), step(net, x))


def test_nested_names(net):
    model = nn.ModuleDict(dict(detector=net))
    report = turn_on(model, modules=['detector.head'])
    assert [row.bn for row in report.rows] == ['detector.head.1']


def test_deploy_folds_for_good(net, x):
    stock = stock_copy(net)
    weights = {conv: net.get_submodule(conv).weight for conv, _ in PAIRS}
    report = turn_on(net, 'Deploy')
    assert [row.mode for row in report.rows] == ['Deploy'] * 3 + ['stock']
    for conv, bn in PAIRS:
        assert isinstance(net.get_submodule(bn), nn.Identity)
        assert isinstance(net.get_submodule(bn), FoldedNorm)
        assert net.get_submodule(conv).weight is weights[conv]
        assert net.get_submodule(conv).bias.requires_grad
    torch.testing.assert_close(net(x), stock(x))
    # Its gradient is Tune's divided by the coefficient.
    expected, actual = step(stock, x), step(net, x)
    norm = stock.head[1]
    coeff = norm.weight * (norm.running_var + norm.eps).rsqrt()
    torch.testing.assert_close(
        actual['grad of head.0.weight'],
        (expected['grad of head.0.weight'] / coeff.view(-1, 1, 1, 1)).detach())


def test_deploy_parameters_are_known_to_an_earlier_optimizer(net, x):
    known = {id(p) for p in net.parameters()}
    turn_on(net, 'Deploy')
    assert {id(p) for p in net.parameters()} <= known


def test_deploy_of_frozen_and_not_affine_blocks(x):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)).double().eval()
    stock = stock_copy(randomize(model)).requires_grad_(False)
    model.requires_grad_(False)
    turn_on(model, 'Deploy')
    torch.testing.assert_close(model(x), stock(x))
    assert not any(p.requires_grad for p in model.parameters())


def test_deploy_leaves_shared_layers_out(x):

    class Shared(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
            self.last = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            for bn in self.bns:
                x = bn(self.conv(x))
            return self.last(x)

    model = randomize(Shared()).double().eval()
    stock = stock_copy(model)
    report = turn_on(model, 'Deploy')
    assert [row.bn for row in report.rewritten] == ['last.1']
    assert [row.bn for row in report.left_out] == ['bns.0', 'bns.1']
    torch.testing.assert_close(model(x), stock(x))


@pytest.mark.parametrize('call', [
    turn_off, lambda model: turn_on(model), lambda model: turn_on(
        model, 'Eval', modules='head')
])
def test_deploy_has_no_way_back(net, x, call):
    turn_on(net, 'Deploy')
    expected = step(net, x)
    with pytest.raises(RuntimeError, match='3 blocks are in Deploy|1 blocks'):
        call(net)
    assert_equal_steps(expected, step(net, x), 0)


WRONG = {
    'unknown mode': (dict(mode='Freeze'), ValueError,
                     "Train, Eval, Tune, Deploy, but got 'Freeze'"),
    'mode of a wrong type': (dict(mode=3), ValueError, 'Train, Eval, Tune'),
    'unknown name': (dict(modules=['backbone', 'nek']), ValueError,
                     "no submodule 'nek'; it has backbone, neck, head"),
    'unknown nested name': (dict(modules='head.7'), ValueError,
                            "'head' has no submodule '7'; it has 0, 1, 2"),
    'empty name': (dict(modules=''), ValueError, 'it has backbone'),
    'no names': (dict(modules=[]), ValueError, 'at least one submodule'),
    'a module for a name': (dict(modules=nn.ReLU()), TypeError,
                            'a name or a list of names'),
    'numbers for names': (dict(modules=[1]), TypeError, 'list of names'),
    'nothing to tune': (dict(modules='neck'), ValueError,
                        'but found 1 GroupNorm'),
    'no norm at all': (dict(modules='head.2'), ValueError,
                       'but found no normalization'),
    'nothing to hold': (dict(modules='neck', mode='Eval'), ValueError,
                        'but found 1 GroupNorm'),
    'nothing to deploy': (dict(modules='neck', mode='Deploy'), ValueError,
                          'but found 1 GroupNorm'),
    'contradiction': (dict(mode='Train', norm_eval=True), ValueError,
                      'must not be True'),
    'other contradiction': (dict(mode='Eval', norm_eval=False), ValueError,
                            'must not be False'),
    'norm_eval of a wrong type': (dict(norm_eval='yes'), ValueError,
                                  "but got 'yes'"),
}


@pytest.mark.parametrize('on', [False, True])
@pytest.mark.parametrize(
    'arguments, error, message', WRONG.values(), ids=WRONG)
def test_wrong_arguments_change_nothing(net, x, on, arguments, error,
                                        message):
    if on:
        turn_on(net, norm_eval=True)
    before, printed, expected = facts(net), repr(net), step(net, x)
    with pytest.raises(error, match=message):
        turn_on(net, **arguments)
    assert_same_facts(before, facts(net))
    assert repr(net) == printed
    assert_equal_steps(expected, step(net, x), 0)


@pytest.mark.parametrize('call', [turn_on, turn_off])
@pytest.mark.parametrize('model', [None, 'resnet', dict(type='ResNet')])
def test_model_must_be_a_module(call, model):
    with pytest.raises(TypeError, match='must be a torch.nn.Module'):
        call(model)


def test_print_shows_what_is_rewritten(net):
    stock = repr(net)
    turn_on(net, modules='backbone', norm_eval=True)
    lines = repr(net).splitlines()
    assert sum('tune=True' in line for line in lines) == 4
    assert sum('norm_eval=True' in line for line in lines) == 2
    turn_off(net)
    assert repr(net) == stock


def test_optimizer_and_state_dict_go_on(net, x):
    """Three steps of SGD, turned on in between, with a checkpoint."""
    stock = stock_copy(net)
    optimizers = [
        torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
        for m in (stock, net)
    ]
    for i in range(3):
        for model, optimizer in zip((stock, net), optimizers):
            step(model, x)
            optimizer.step()
        if i == 0:
            turn_on(net)
    for one, other in zip(stock.parameters(), net.parameters()):
        torch.testing.assert_close(one, other)
    fresh = randomize(Net(), 7).double().eval()
    fresh.load_state_dict(net.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), net(x))
    net.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(net(x), stock(x))


def test_a_copy_of_a_rewritten_model_can_be_turned_off(net, x):
    stock = stock_copy(net)
    turn_on(net)
    other = copy.deepcopy(net)
    turn_off(net)
    assert runs(other) == ['not run'] * 3
    assert_equal_steps(step(stock, x), step(other, x))
    assert runs(other) == ['fused'] * 3


def test_tune_keeps_what_deploy_keeps(net):
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    kept = {}
    for mode in ('Eval', 'Tune', 'Deploy'):
        model = stock_copy(net)
        turn_on(model, mode)
        with saved_bytes(model) as saved:
            y = model(x)
        kept[mode] = saved.total
        del y
    assert kept['Tune'] <= 1.01 * kept['Deploy'] < 0.8 * kept['Eval']


def test_public_names():
    assert set(mmtune.__all__) == {'__version__', 'turn_off', 'turn_on'}


def test_overlapping_roots_are_held_once(net):
    net.train()
    turn_on(net, modules=['backbone', 'head', 'head.1'], norm_eval=True)
    turn_off(net)
    assert all(m.training for m in net.modules())


def test_unpaired_bns_are_held_too():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    report = turn_on(model, 'Eval')
    assert [(row.bn, row.mode) for row in report.rows] == [('0', 'Eval')]
    model.train()
    assert not model[0].training


UNFIT_FOR_DEPLOY = {
    'a weight that another module has': (
        lambda m: m.add_module('twin', nn.Conv2d(8, 8, 3, padding=1))
        or setattr(m.twin, 'weight', m.backbone[3].weight), 'backbone.4',
        'no other module shares'),
    'BNs that share parameters': (
        lambda m: setattr(m.backbone[4], 'weight', m.backbone[1].weight),
        'backbone.4', 'no other module shares'),
    'a weight made by a pre-hook': (
        lambda m: nn.utils.spectral_norm(m.backbone[3]), 'backbone.4',
        'plain parameter'),
    'a parametrized weight': (
        lambda m: nn.utils.parametrizations.orthogonal(m.head[0]), 'head.1',
        'plain parameter'),
    'a hook': (lambda m: m.head[1].register_forward_hook(
        lambda module, args, y: y * 2), 'head.1', 'hooks of the pair'),
    'a call from another module': (
        lambda m: m.neck.append(m.backbone[3]), 'backbone.4', 'called once'),
}


@pytest.mark.parametrize('part', [None, ['backbone', 'head']])
@pytest.mark.parametrize(
    'change, norm, reason', UNFIT_FOR_DEPLOY.values(), ids=UNFIT_FOR_DEPLOY)
def test_deploy_leaves_out_what_it_cannot_be_sure_of(net, x, change, norm,
                                                     reason, part):
    change(net)
    expected = net(x)
    report = turn_on(net, 'Deploy', modules=part)
    reasons = {row.bn: row.reason for row in report.left_out}
    assert reason in reasons[norm]
    torch.testing.assert_close(net(x), expected)


def test_nothing_to_deploy_says_why(x):
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match='2 x Deploy needs a pair that is'):
        turn_on(model, 'Deploy')


def test_layers_that_are_not_initialized_yet(x):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LazyConv2d(4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1),
        nn.LazyBatchNorm2d(), nn.LazyConvTranspose2d(3, 2),
        nn.LazyBatchNorm2d(), nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4)).double().eval()
    report = turn_on(model)
    assert not report.left_out
    model(x)  # in which they are made
    model(x)
    assert runs(model) == ['fused'] * 4
    assert [type(m).__name__ for m in model[:2]] == ['Conv2d', 'BatchNorm2d']
    turned_off = stock_copy(model)
    turn_off(turned_off)
    assert type(turned_off[0]) is nn.Conv2d
    assert not list(turned_off[0].buffers())
    randomize(model)
    turned_off.load_state_dict(model.state_dict())
    assert_equal_steps(step(turned_off, x), step(model, x))


def test_blocks_of_a_graph_module_are_found(net, x):
    net.head = torch.fx.symbolic_trace(net.head)
    stock = stock_copy(net)
    report = turn_on(net)
    assert [row.bn for row in report.left_out] == ['neck.1']
    assert_equal_steps(step(stock, x), step(copy.deepcopy(net), x))
    assert_equal_steps(step(stock, x), step(net, x))


@pytest.mark.parametrize('training, norm_eval, expected', [
    (False, None, 0), (True, None, 3), (True, True, 0)
])
def test_report_counts_bns_in_train_mode(net, training, norm_eval, expected):
    net.train(training)
    assert turn_on(net, norm_eval=norm_eval).in_train_mode == expected
