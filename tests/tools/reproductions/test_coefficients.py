import math

import mmcv
import pytest
import torch
from mmdet.models import MobileNetV2
from reproductions import coefficients
from torch import nn

from tests.oracle import randomize
from tests.tools.synthetic import filled


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Weights in the place of the pretrained ones."""
    model = randomize(MobileNetV2(out_indices=(7, )))
    path = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), path)
    monkeypatch.setattr(coefficients, 'fetch_weights', lambda: str(path))
    return model


def test_coefficients_are_those_of_the_checkpoint(weights, tmp_path):
    found = coefficients.run(factor=4)
    norms = {
        name: norm
        for name, norm in weights.named_modules()
        if isinstance(norm, nn.BatchNorm2d)
    }
    assert sorted(row['bn'] for row in found['blocks']) == sorted(norms)
    every = []
    for row in found['blocks']:
        norm = norms[row['bn']]
        coeff = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
        assert math.isclose(
            row['coeff']['max'], coeff.max().item(), rel_tol=1e-5)
        every.append(coeff)
    every = torch.cat(every)
    assert math.isclose(found['total']['SGD']['at_same_lr']['faster'],
                        (every**-2 > 4).double().mean().item())
    assert math.isclose(found['total']['Adam']['at_same_lr']['slower'],
                        (every**-1 < 1 / 4).double().mean().item())
    page = filled('coefficients', found)
    assert f'{len(every)} channels in {len(norms)} blocks' in page
    assert 'within 4 times' in page
    coefficients.plot(found, tmp_path / 'plot.png')
    assert mmcv.imread(str(tmp_path / 'plot.png')).std() > 10
