"""A convolution and its normalization that two modules call."""
import copy

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import spectral_norm
from torch.utils.checkpoint import checkpoint

from mmtune import turn_off, turn_on
from tests.oracle import assert_equal_steps, randomize, runs, step, stock_copy

SHAPE = (2, 4, 6, 7)


class Wrapper(nn.Module):
    """Returns what its convolution returns."""

    def __init__(self, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 6, 3)

    def forward(self, x):
        return self.conv(x * 2)


class Separable(nn.Sequential):
    """As smp's SeparableConv2d."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(4, 4, 3, groups=4), nn.Identity(), nn.Conv2d(4, 6, 1))


class Conv2Plus1D(nn.Sequential):
    """As torchvision's: it has a block of its own, too."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(4, 5, (1, 3)), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 6, (3, 1)))


class ADN(nn.Sequential):
    """As monai's: normalization, dropout, activation."""

    def __init__(self):
        super().__init__()
        self.add_module('N', nn.BatchNorm2d(6))
        self.add_module('D', nn.Identity())
        self.add_module('A', nn.PReLU())


class PreActivation(nn.Module):
    """As DenseNet's layers: it begins with a normalization."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x, scale=None):
        y = self.conv(self.norm(x).relu())
        return y if scale is None else y * scale


class AsksFirst(PreActivation):

    def forward(self, x):
        batch, channels, *_ = x.shape
        assert x.dim() == 4 and channels == 6
        return super().forward(x).view(batch, -1)


class Reused(PreActivation):
    """It reads its argument twice."""

    def forward(self, x):
        return super().forward(x) + x


class ChangesArgument(PreActivation):

    def forward(self, x):
        return super().forward(x.mul_(2))


class Tail(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = Wrapper()
        self.layers = nn.ModuleList([PreActivation(), ADN()])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Siblings(nn.Module):
    """As DPN's first blocks: the convolution is in one, the BN in another."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(4, 6, 3))
        self.b = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x):
        return self.b(self.a(x))


class ReachesIn(nn.Module):
    """As smp's VGG encoder: it calls the layers of a container itself."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))

    def forward(self, x):
        for layer in self.features:
            x = layer(x)
        return x


class Contrastive(nn.Module):
    """As YOLOE's head: it begins with a BN, and takes more than a map."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x, scale):
        return self.norm(x) * scale


class GivesMore(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 6, 3), Contrastive()

    def forward(self, x):
        mean = x.mean()
        return self.head(self.conv(x), mean)


class GivesTwice(GivesMore):

    def forward(self, x):
        y = self.conv(x)
        return self.head(y, scale=y)


class Conditional(nn.Module):
    """As BigGAN's: what it scales with it computes before it normalizes."""

    def __init__(self, gain=None):
        super().__init__()
        self.gain = gain or nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm2d(6, affine=False)

    def forward(self, x, y):
        gain = self.gain(y)
        gain = (1. + gain.flatten(1) / 2).view(y.size(0), -1, 1, 1)
        return self.norm(x) * torch.sigmoid(gain)


class GivesCondition(nn.Module):

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), norm

    def forward(self, x):
        condition = x[:, :3, :2, 0].flatten(1)
        if isinstance(self.norm.gain, nn.Embedding):
            condition = condition[:, 0].gt(0).long()
        return self.norm(self.conv(x), condition)


def conditional(gain=nn.Identity, of=Conditional):
    return lambda: GivesCondition(of(gain()))


class ChangesOther(Conditional):

    def forward(self, x, y):
        y.clamp_(0)
        return super().forward(x, y)


class WritesOther(Conditional):

    def forward(self, x, y):
        torch.add(y, 1, out=y)
        return super().forward(x, y)


class AddsToOther(Conditional):

    def forward(self, x, y):
        y += 1
        return super().forward(x, y)


class AssignsOther(Conditional):

    def forward(self, x, y):
        y.data = y * 2
        return super().forward(x, y)


class SetsItemOfOther(Conditional):

    def forward(self, x, y):
        y[0] = 1
        return super().forward(x, y)


class CallsOther(Conditional):
    """Whose second argument may be any object."""

    def forward(self, x, y):
        y.name()
        return super().forward(x, y)


def renormalizing():
    return nn.Embedding(2, 6, max_norm=1)


def hooked():
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


class PreConv(nn.Module):
    """As pytorchcv's: it returns what its convolution was given, too."""

    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, 6, 1)

    def forward(self, x):
        y = self.bn(x).relu()
        return self.conv(y), y


class PreBlock(nn.Module):

    def __init__(self):
        super().__init__()
        self.first, self.second = PreConv(4), PreConv(6)

    def forward(self, x):
        x, before = self.first(x)
        x, _ = self.second(x)
        return x, before


class ReadsTwice(PreBlock):

    def forward(self, x):
        both = self.first(x)
        return self.second(both[0])[0] + both[0]


class ReturnsTwice(PreConv):

    def forward(self, x):
        y = self.conv(self.bn(x))
        return y, y


class OfTwo(PreBlock):

    def __init__(self):
        super().__init__()
        self.first = ReturnsTwice(4)


class Stem(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class ReachesIntoABlock(nn.Module):
    """As smp's DPN encoder: it calls the layers of a block, not the block."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(Stem(), nn.ReLU())

    def forward(self, x):
        x = self.features[0].conv(x)
        x = self.features[0].bn(x)
        return self.features[1:](x)


def sequential(*modules):
    return lambda: nn.Sequential(*(m() if callable(m) and not isinstance(
        m, nn.Module) else m for m in modules))


def bn():
    return nn.BatchNorm2d(6)


def traced(build):
    return lambda: fx.symbolic_trace(build())


# How many blocks there are, and how many fuse.
FOUND = {
    'wrapper': (sequential(Wrapper, bn), 1),
    'wrapper of a wrapper': (sequential(lambda: Wrapper(Wrapper()), bn), 1),
    'container in a container': (
        sequential(lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3)), bn),
        1),
    'separable': (sequential(Separable, bn), 1),
    'a block inside': (sequential(Conv2Plus1D, bn, nn.ReLU), 2),
    'a BN in a child': (sequential(lambda: nn.Conv2d(4, 6, 3), ADN), 1),
    'a layer that begins with one': (
        sequential(lambda: nn.Conv2d(4, 6, 3), PreActivation), 1),
    'one that asks first': (
        sequential(lambda: nn.Conv2d(4, 6, 3), AsksFirst), 1),
    'both': (sequential(Conv2Plus1D, ADN), 2),
    'siblings': (Siblings, 1),
    'siblings in a container': (sequential(Siblings, nn.ReLU), 1),
    'a list of layers': (Tail, 2),
    'an identity between': (
        sequential(lambda: nn.Conv2d(4, 6, 3), nn.Identity, bn), 1),
    'its container is not called': (ReachesIn, 2),
    'its block is not called': (ReachesIntoABlock, 1),
    'an argument more': (GivesMore, 1),
    'a condition': (conditional(lambda: nn.Linear(6, 6)), 1),
    'a condition with spectral_norm': (
        conditional(lambda: spectral_norm(nn.Linear(6, 6))), 1),
    'an embedded condition': (conditional(lambda: nn.Embedding(2, 6)), 1),
    'an output more': (sequential(lambda: nn.Conv2d(4, 4, 1), PreBlock), 2),
    'traced': (traced(sequential(Wrapper, bn)), 1),
    'traced, with children': (traced(Tail), 2),
}
LEFT_OUT = {
    'given twice': (GivesTwice, "the argument 'x'"),
    'an output that is read twice': (ReadsTwice, "the argument 'x'"),
    'an output that is given twice': (OfTwo, "the argument 'x'"),
    'another module in between': (
        conditional(lambda: nn.Sequential(nn.Linear(6, 6))), "'x'"),
    'a hook in between': (conditional(hooked), "'x'"),
    'a method in place': (conditional(of=ChangesOther), "'x'"),
    'an operator with out': (conditional(of=WritesOther), "'x'"),
    'an augmented assignment': (conditional(of=AddsToOther), "'x'"),
    'an assigned attribute': (conditional(of=AssignsOther), "'x'"),
    'an assigned item': (conditional(of=SetsItemOfOther), "'x'"),
    'a method that is no operator': (conditional(of=CallsOther), "'x'"),
    'an embedding that writes to its weight': (
        conditional(renormalizing), "'x'"),
    'reads its argument twice': (
        sequential(lambda: nn.Conv2d(4, 6, 3), Reused), "the argument 'x'"),
    'changes its argument': (
        sequential(lambda: nn.Conv2d(4, 6, 3), ChangesArgument), '`mul_`'),
}


def prepared(build):
    torch.manual_seed(0)
    return randomize(build()).double().eval()


def compare(model, stock):
    torch.manual_seed(1)
    x = torch.randn(SHAPE, dtype=torch.float64)
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))


@pytest.mark.parametrize('build, count', FOUND.values(), ids=FOUND)
def test_found_and_fused(build, count):
    model = prepared(build)
    stock = stock_copy(model)
    assert not turn_on(model).left_out
    compare(model, stock)
    assert runs(model) == ['fused'] * count
    for one in (model, stock):
        one.train()
    compare(model, stock)
    assert runs(model) == ['train mode'] * count
    turn_off(model)
    compare(model.eval(), stock.eval())


@pytest.mark.parametrize('build, reason', LEFT_OUT.values(), ids=LEFT_OUT)
def test_left_out(build, reason):
    model = prepared(build)
    with pytest.raises(ValueError, match=reason):
        turn_on(model)


def hook_of(values):

    def hook(module, args, output=None):
        values.append(args[0].sum())
        if output is not None:
            values.append(output.sum())

    return hook


@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('build, name', [
    (sequential(Wrapper, bn), '0'),
    (sequential(lambda: Wrapper(Wrapper()), bn), '0.conv'),
    (sequential(lambda: nn.Conv2d(4, 6, 3), nn.Identity, bn), '1'),
    (sequential(lambda: nn.Conv2d(4, 6, 3), ADN), '1'),
    (Siblings, 'a'),
    (Siblings, 'b'),
])
def test_hooks_on_the_way_see_what_they_would_of_stock(build, name, before):
    """Whenever they are registered; and without them the block is fused."""
    model = prepared(build)
    stock = stock_copy(model)
    turn_on(model)
    compare(model, stock)
    assert runs(model) == ['fused']
    seen = [], []
    handles = []
    for one, values in zip((model, stock), seen):
        part = one.get_submodule(name)
        register = (part.register_forward_pre_hook
                    if before else part.register_forward_hook)
        handles.append(register(hook_of(values)))
    compare(model, stock)
    torch.testing.assert_close(*seen)
    assert runs(model) == ['stock']
    for handle in handles:
        handle.remove()
    compare(model, stock)
    assert runs(model) == ['fused']


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('around', ['conv', 'norm', 'both'])
def test_checkpoints(around, reentrant):

    class Checkpointed(Siblings):

        def forward(self, x):
            if around == 'both':
                return checkpoint(super().forward, x, use_reentrant=reentrant)
            run = [lambda m, y: m(y)] * 2
            run[around == 'norm'] = lambda m, y: checkpoint(
                m, y, use_reentrant=reentrant)
            return run[1](self.b, run[0](self.a, x))

    model = prepared(lambda: nn.Sequential(
        Checkpointed(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))
    stock = stock_copy(model)
    turn_on(model)
    compare(model, stock)


def test_a_wrapper_used_by_itself_is_stock():
    model = prepared(Siblings)
    stock = stock_copy(model)
    turn_on(model)
    x = torch.randn(SHAPE, dtype=torch.float64)
    y = model.a(x)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, stock.a(x))


def test_a_wrapper_that_hides_its_output_in_a_list():
    """Where it turns out to do what the trace did not see."""

    class Hides(Wrapper):
        hides = False

        def forward(self, x):
            y = super().forward(x)
            if self.hides:
                self.kept = [y]
            return y

    model = prepared(sequential(Hides, bn))
    stock = stock_copy(model)
    turn_on(model)
    for one in (model, stock):
        one[0].hides = True
    compare(model, stock)
    torch.testing.assert_close(model[0].kept[0] + 0, stock[0].kept[0])


@pytest.mark.parametrize('mode', ['Train', 'Eval', 'Deploy'])
def test_other_modes(mode):
    model = prepared(Siblings)
    stock = stock_copy(model).train(mode == 'Train')
    if mode == 'Deploy':
        with pytest.raises(ValueError, match='called once on every way'):
            turn_on(model, mode)
        return
    turn_on(model, mode)
    compare(model, stock)


def test_deploy_of_a_container_whose_layers_are_called():
    model = prepared(ReachesIn)
    stock = stock_copy(model)
    assert not turn_on(model, 'Deploy').left_out
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock(x))


class Tokens(nn.Module):
    """As LeViT's LinearNorm."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


def test_a_linear_layer_on_tokens():
    model = prepared(Tokens)
    stock = stock_copy(model)
    assert not turn_on(model).left_out
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    for _ in range(2):
        assert_equal_steps(step(stock, x), step(model, x))
        assert runs(model) == ['fused']
    # Four dimensions: the first two are not all but the channels.
    x = torch.randn(1, 6, 1, 4, dtype=torch.float64)
    for one in (stock, model):
        one.linear = nn.Linear(4, 6).double()
        one.linear.load_state_dict(stock.linear.state_dict())
    turn_on(model)
    with pytest.raises(ValueError):
        stock(x[0][None, None])
    with pytest.raises(ValueError):
        model(x[0][None, None])


@pytest.mark.whole_graph
def test_compiled():
    """There a pair of two modules is stock."""
    model = prepared(FOUND['both'][0])
    turn_on(model)
    x = torch.randn(SHAPE, dtype=torch.float64)
    expected = model(x)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_a_copy_of_a_graph_module_is_stock_or_fused():
    model = prepared(FOUND['traced'][0])
    stock = stock_copy(model)
    turn_on(model)
    compare(copy.deepcopy(model), stock)
