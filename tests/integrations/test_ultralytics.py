"""Runs of Ultralytics' trainer in Tune mode, against stock ones.

``make train LIB=ultralytics`` runs them; the recipe is that of
docs/en/libraries.md.
"""
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from mmtune import turn_off, turn_on
from mmtune.analysis import saved_bytes
from mmtune.api import activation_runs, latest_runs
from mmtune.behaviours.remade import spared

ultralytics = pytest.importorskip('ultralytics')
cv2 = pytest.importorskip('cv2')
from ultralytics.models.yolo.detect import (  # noqa: E402 - where it is
    DetectionTrainer,
)
from ultralytics.nn.modules import Conv  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')
IMAGES, BLOCKS = 8, 81
LOAD_WITHOUT_MMTUNE = """
import sys
sys.modules['mmtune'] = None
from ultralytics import YOLO
print(YOLO(sys.argv[1]).model.model[0].conv.weight.sum().item())
"""


class InFloat64(DetectionTrainer):
    """So wide since batch statistics of small maps magnify rounding."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        model = super().get_model(cfg, weights, verbose)
        for module in model.modules():
            if weights is None and isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -.1, .1)
                nn.init.uniform_(module.running_var, .1, .3)
        return model.double()

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        batch['img'] = batch['img'].double()
        return batch


@pytest.fixture
def data(tmp_path):
    numbers = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    for index in range(IMAGES):
        image = numbers.integers(256, size=(64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / 'images' / f'{index}.png'), image)
        (tmp_path / 'labels' / f'{index}.txt').write_text('0 .5 .5 .4 .4\n')
    path = tmp_path / 'data.yaml'
    path.write_text(f'path: {tmp_path}\ntrain: images\nval: images\n'
                    'names: [thing]\n')
    return path


def tuned(trainer, **options):
    turn_on(trainer.model, **options)


def hold_norms(trainer):
    """What a user of a stock model does to fix statistics."""
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def train(data, name, model='yolo11n.yaml', callbacks=(), trainer=InFloat64,
          **options):
    """Return the losses, the last state, and how things ran."""
    yolo = ultralytics.YOLO(model)
    losses, seen = [], {}

    def note(trainer):
        seen.update(
            blocks=Counter(latest_runs(trainer.model).values()),
            activations=activation_runs(trainer.model),
            state={key: value.clone() for key, value
                   in trainer.model.state_dict().items()})

    yolo.add_callback('on_train_batch_end',
                      lambda trainer: losses.append(float(trainer.loss)))
    yolo.add_callback('on_train_epoch_end', note)
    for event, function in callbacks:
        yolo.add_callback(event, function)
    options = dict(dict(
        data=str(data), epochs=2, imgsz=64, batch=2, nbs=2, workers=0,
        device='cpu', amp=False, plots=False, val=False, optimizer='SGD',
        lr0=1e-3, warmup_epochs=0, project=str(data.parent), name=name),
        **options)
    yolo.train(trainer=trainer, **options)
    return losses, seen


def recipe(**options):
    return [('on_train_start', lambda trainer: tuned(trainer, **options)),
            ('on_train_end', lambda trainer: turn_off(trainer.model))]


HOLD = [('on_train_batch_start', hold_norms)]


@pytest.mark.parametrize('stock, tune, options, fused', [
    ([], {}, {}, 0),
    (HOLD, dict(norm_eval=True), {}, BLOCKS),
    ([], {}, dict(freeze=10), 33),
], ids=['trained', 'held', 'frozen'])
def test_a_run_equals_stock(data, stock, tune, options, fused):
    """With BatchNorms that train, are held, or are frozen by `freeze`."""
    expected, of_stock = train(data, 'stock', callbacks=stock, **options)
    before = spared()
    losses, seen = train(data, 'tune', callbacks=recipe(**tune), **options)
    assert len(losses) == IMAGES
    assert losses == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(
        seen['state'], of_stock['state'], rtol=1e-6, atol=1e-8)
    assert seen['blocks']['fused'] == fused
    assert seen['blocks'].total() == BLOCKS
    # One module for all layers.
    assert list(seen['activations'].values()) == ['one map']
    assert spared() > before


def kept(frozen, hold, mode=None):
    """Bytes that a forward keeps for backward, of a model in a mode."""
    model = ultralytics.YOLO('yolo11n.yaml').model.train()
    names = [f'model.{index}.' for index in frozen]
    for name, module in model.named_modules():
        is_frozen = any(part in f'{name}.' for part in names)
        if isinstance(module, nn.BatchNorm2d) and (hold or is_frozen):
            module.eval()
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(not is_frozen and 'dfl' not in name)
    if mode is not None:
        turn_on(model, **mode)
    with saved_bytes(model) as saved:
        output = model(torch.rand(2, 3, 64, 64))
    total = saved.total  # as long as there is something to go backward from
    del output
    turn_off(model)
    return total


@pytest.mark.parametrize('frozen, hold, folding_saves', [
    ([], False, False),
    ([], True, True),
    (range(10), False, False),
    ([13, 16], False, True),
])
def test_what_saves(frozen, hold, folding_saves):
    stock = kept(frozen, hold)
    folded = kept(frozen, hold, dict(activations=False))
    assert (folded < .95 * stock) == folding_saves
    assert kept(frozen, hold, {}) < .9 * folded


def load_without_mmtune(path):
    return subprocess.run(
        [sys.executable, '-c', LOAD_WITHOUT_MMTUNE, str(path)],
        cwd=path.parent, capture_output=True, text=True)


def test_checkpoints_need_no_mmtune(data):
    """Neither those of the run, nor those of a stock run after it."""
    for name, callbacks in (('tune', recipe()), ('later', [])):
        train(data, name, callbacks=callbacks, epochs=1)
        for file in ('last.pt', 'best.pt'):
            result = load_without_mmtune(data.parent / name / 'weights' / file)
            assert result.returncode == 0, result.stderr


def test_left_on_it_is_in_later_checkpoints(data):
    """Since all models share an activation: why the recipe turns it off."""
    models = []
    try:
        train(data, 'tune', callbacks=[
            ('on_train_start', tuned),
            ('on_train_end', lambda trainer: models.append(trainer.model))],
            epochs=1)
        path = data.parent / 'tune' / 'weights' / 'last.pt'
        assert load_without_mmtune(path).returncode == 0
        train(data, 'later', epochs=1)
        path = data.parent / 'later' / 'weights' / 'last.pt'
        assert 'mmtune' in load_without_mmtune(path).stderr
    finally:
        turn_off(models[0])
    assert 'forward' not in vars(Conv.default_act)


def test_resumed(data):
    def keep(trainer):
        if trainer.epoch == 0:
            shutil.copy(trainer.last, data.parent / f'{trainer.args.name}.pt')

    results = {}
    for name, callbacks in (('stock', []), ('tune', recipe())):
        train(data, name, callbacks=[*callbacks, ('on_model_save', keep)])
        path = data.parent / f'{name}.pt'
        results[name], _ = train(data, name, path, callbacks, resume=True)
    assert len(results['tune']) == IMAGES // 2
    assert results['tune'] == pytest.approx(results['stock'], rel=1e-6)
