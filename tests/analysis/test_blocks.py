"""What list_blocks says of layers in all states."""
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmtune import turn_on
from mmtune.analysis import TensorInfo, list_blocks
from mmtune.report import Report, Row


def listed(model, **options):
    return list_blocks(model, turn_on(model, **options))


def block(conv=None, norm=None):
    return nn.Sequential(conv or nn.Conv2d(3, 4, 3), norm
                         or nn.BatchNorm2d(4))


class Frozen(nn.Module):
    """Called FrozenBatchNorm2d below, as torchvision's."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


FrozenBatchNorm2d = type('FrozenBatchNorm2d', (Frozen, ), {})


def test_a_block():
    found, = listed(block().to(torch.float64))
    assert found.conv == '0' and found.bn == '1'
    assert (found.conv_type, found.bn_type) == ('Conv2d', 'BatchNorm2d')
    assert (found.mode, found.reason) == ('Tune', '')
    assert found.out_channels == 4
    assert found.weight == TensorInfo((4, 3, 3, 3), 'float64', True)
    vector = TensorInfo((4, ), 'float64', True)
    assert found.bias == found.gamma == found.beta == vector


@pytest.mark.parametrize('training, runs', [(True, 'BN trains'),
                                            (False, 'Tune')])
def test_whether_the_statistics_are_fixed(training, runs):
    found, = listed(block().train(training))
    assert found.bn_is_fixed == (not training)
    assert found.runs == runs


@pytest.mark.parametrize('mode', ['Train', 'Eval'])
def test_other_modes(mode):
    found, = listed(block(), mode=mode)
    assert found.runs == mode
    assert found.bn_is_fixed == (mode == 'Eval')


def test_a_frozen_norm_is_fixed_in_train_mode():
    found, = listed(block(norm=FrozenBatchNorm2d(4)).train())
    assert found.runs == 'Tune' and found.bn_is_fixed
    assert found.out_channels == 4
    assert found.gamma == TensorInfo((4, ), 'float32', False)


def test_a_norm_alone_and_its_reason():
    model = nn.Sequential(*block(), nn.ReLU(), nn.BatchNorm2d(4))
    _, found = listed(model.eval())
    assert found.conv is found.conv_type is found.weight is None
    assert found.bn == '3' and found.runs == 'left out'
    assert found.mode == 'stock' and 'ReLU' in found.reason
    assert found.out_channels == 4


def test_what_does_not_learn():
    model = block()
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    found, = listed(model)
    assert not found.weight.learns and not found.beta.learns
    assert found.bias.learns and found.gamma.learns


def test_tensors_that_are_not_there():
    model = block(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
    found, = listed(model)
    assert found.bias is found.gamma is found.beta is None


@pytest.mark.parametrize('make, shape', [
    (parametrizations.weight_norm, None),
    (parametrizations.spectral_norm, (4, 3, 3, 3)),
    (lambda conv: prune.l1_unstructured(conv, 'weight', .5), (4, 3, 3, 3)),
])  # yapf: disable
def test_a_weight_that_is_made_anew(make, shape):
    model = block(make(nn.Conv2d(3, 4, 3)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found, = listed(model)
    assert found.weight == TensorInfo(shape, 'float32', True)
    assert found.bias == TensorInfo((4, ), 'float32', True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_other_parameters_of_a_layer_are_not_taken_for_its_bias():
    from mmcv.ops import DeformConv2dPack
    conv = DeformConv2dPack(3, 4, 3)
    assert any(name.endswith('bias') for name, _ in conv.named_parameters())
    found, = listed(block(conv))
    assert found.bias is None
    assert found.weight.shape == (4, 3, 3, 3)


def test_layers_that_take_their_shape_from_the_first_input():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    found, = listed(model)
    assert found.weight == TensorInfo(None, 'float32', True)
    assert found.gamma.shape is None
    assert found.out_channels == 4


def test_a_linear_layer():
    found, = listed(block(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    assert found.out_channels == 4 and found.weight.shape == (4, 5)


def test_a_convolution_with_several_norms():
    class Heads(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, xs):
            return [norm(self.conv(x)) for norm, x in zip(self.norms, xs)]

    found = listed(Heads())
    assert [row.bn for row in found] == ['norms.0', 'norms.1']
    assert {row.conv for row in found} == {'conv'}


def test_a_report_of_a_copy_will_do():
    model = block()
    report = turn_on(block(), 'Deploy')
    found, = list_blocks(model, report)
    assert found.runs == 'Deploy' and found.gamma is not None
    assert not any(name.startswith('_tune') for name in vars(model[1]))


def test_folded_blocks_are_refused():
    model = block()
    report = turn_on(model, 'Deploy')
    with pytest.raises(ValueError, match="'1' is folded into '0'"):
        list_blocks(model, report)


def test_a_report_of_another_model_is_refused():
    report = Report('Tune', [Row(None, 'backbone.bn', 'Tune')])
    with pytest.raises(AttributeError, match='backbone'):
        list_blocks(block(), report)
