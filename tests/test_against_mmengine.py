"""The lines of the README's table, where both can be run."""
import copy

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval_for_single_model,
)

from mmtune import turn_on
from mmtune.analysis import saved_bytes
from tests.oracle import assert_equal_steps, randomize, step


def resnet(**options):
    torch.manual_seed(0)
    model = ResNet(depth=50, norm_eval=True, **options)
    model.train()
    return randomize(model)


def kept(rewrite, x, learns=True):
    model = resnet().requires_grad_(learns)
    rewrite(model)
    with saved_bytes(model) as saved:
        outputs = model(x)
    return saved.total if outputs else None


@pytest.mark.slow
@pytest.mark.parametrize('learns', [True, False])
def test_keeps_less(learns):
    x = torch.randn(1, 3, 64, 64).requires_grad_(not learns)
    upstream = kept(turn_on_efficient_conv_bn_eval_for_single_model, x, learns)
    assert kept(turn_on, x, learns) < 0.8 * upstream


@pytest.mark.slow
def test_equals_where_both_work():
    model = resnet().double()
    other = copy.deepcopy(model)
    turn_on_efficient_conv_bn_eval_for_single_model(other)
    turn_on(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_equal_steps(step(other, x), step(model, x))


@pytest.mark.slow
def test_works_with_checkpointed_blocks():
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    stock = resnet(with_cp=True).double()
    with pytest.raises(torch.fx.proxy.TraceError):
        turn_on_efficient_conv_bn_eval_for_single_model(copy.deepcopy(stock))
    model = copy.deepcopy(stock)
    turn_on(model)
    assert_equal_steps(step(stock, x), step(model, x))
