"""tools/finetune_digits.py, as a user runs it and piece by piece."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.models import MobileNetV2
from torch import nn
from torch.utils.data import Subset

from mmtune.api import latest_runs
from tests.oracle import randomize

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/finetune_digits.py'


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location('finetune_digits', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def weights(tmp_path):
    """A checkpoint where the script expects the pretrained one."""
    path = tmp_path / 'checkpoints/mobilenet_v2_imagenet.pth'
    path.parent.mkdir()
    backbone = randomize(MobileNetV2(out_indices=(7, )))
    torch.save(dict(state_dict=backbone.state_dict()), path)
    return path


@pytest.fixture
def train(script, weights, tmp_path, monkeypatch):
    """Trains for a few steps; gives the runner."""
    stock = script.load_data
    monkeypatch.setattr(script, 'load_data', lambda size: [
        Subset(part, range(24)) for part in stock(size)])

    def run(mode):
        runner = script.build_runner(
            mode,
            epochs=1,
            size=32,
            batch_size=8,
            weights=str(weights),
            work_dir=str(tmp_path / 'work'),
            log_level='WARNING')
        runner.train()
        return runner

    return run


@pytest.mark.slow
def test_script_runs(weights, tmp_path):
    result = subprocess.run(
        [
            sys.executable, '-W', 'ignore',
            str(SCRIPT), '--mode', 'tune', '--epochs', '1', '--size', '16'
        ],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300)
    assert result.returncode == 0, result.stdout
    accuracy, = re.findall(r'accuracy: ([\d.]+)', result.stdout)
    assert 0 <= float(accuracy) <= 1
    assert "Tune mode in ['backbone']" in result.stdout
    assert (tmp_path / 'work_dirs/digits/tune/epoch_1.pth').is_file()


def test_wrong_mode_is_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['finetune_digits', '--mode', 'deploy'])
    with pytest.raises(SystemExit, match='2'):
        script.main()
    assert "invalid choice: 'deploy'" in capsys.readouterr().err


@pytest.mark.parametrize('mode, moves', [('train', True), ('eval', False),
                                         ('tune', False)])
def test_statistics_move_in_train_mode_alone(train, weights, mode, moves):
    runner = train(mode)
    before = torch.load(weights)['state_dict']
    after = runner.model.backbone.state_dict()
    changed = {
        name: not torch.equal(value, after[name])
        for name, value in before.items()
    }
    assert {
        changed[name]
        for name in changed if name.endswith(('running_mean', 'running_var'))
    } == {moves}
    # Everything that learns has learned.
    assert all(changed[name]
               for name, _ in runner.model.backbone.named_parameters())


def test_tune_starts_from_the_loss_of_eval_and_folds(train):
    losses = {}
    for mode in ('eval', 'tune'):
        runner = train(mode)
        history, _ = runner.message_hub.get_scalar('train/loss').data
        # Of three steps; runs of the same second share a log.
        losses[mode] = history[-3]
    assert losses['tune'] == pytest.approx(losses['eval'], rel=1e-5)
    norms = [
        module for module in runner.model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    runs = latest_runs(runner.model)
    assert len(runs) == len(norms) == 52
    assert set(runs.values()) == {'fused'}


def test_seed_chooses_the_head(script, weights, tmp_path):
    heads = [
        script.build_runner(
            'eval', seed, weights=str(weights), work_dir=str(tmp_path),
            log_level='WARNING').model.head.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_data_are_all_digits_once(script):
    train_set, test_set = script.load_data(8)
    images = torch.cat([train_set[:][0], test_set[:][0]])
    assert images.shape == (1797, 3, 8, 8)
    assert images.mean() == pytest.approx(0, abs=1e-5)
    assert images.std() == pytest.approx(1, abs=1e-3)
    assert torch.equal(images[:, 0], images[:, 2])
    counts = [part[:][1].bincount() for part in (train_set, test_set)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    # No image is in both parts, but for those that the data hold twice.
    flat = [set(map(bytes, part[:][0].flatten(1).numpy()))
            for part in (train_set, test_set)]
    assert not flat[0] & flat[1]


def test_accuracy_counts_the_batches_together(script):
    metric = script.Accuracy()
    metric.process(None, [True, False])
    metric.process(None, [True])
    metric.process(None, [True])
    assert metric.evaluate(4) == dict(accuracy=0.75)
