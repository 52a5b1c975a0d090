"""Runs of Lightning's Trainer in Tune mode, against stock ones."""
import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mmtune.api import activation_runs, latest_runs
from tests.oracle import randomize

pl = pytest.importorskip('lightning.pytorch')
from mmtune.lightning import TuneMode  # noqa: E402 - where it is

pytestmark = pytest.mark.filterwarnings('ignore')


class Classifier(pl.LightningModule):
    """A backbone of two blocks, and a head."""

    def __init__(self, has_blocks=True):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        if not has_blocks:
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                  nn.Linear(8, 2))
        randomize(self)
        self.double()
        self.losses = []

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, index):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch, index):
        self.log('val_loss', cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, index):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=.1, momentum=.9)


class Freeze(pl.callbacks.BaseFinetuning):
    """Freezes the backbone with its BatchNorms, and frees it in epoch 1."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class HoldNorms(pl.Callback):
    """What a user of stock modules does to fix statistics."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def loader():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, torch.arange(6) % 2), 2)


def trainer(tmp_path, *callbacks, epochs=2):
    return pl.Trainer(
        max_epochs=epochs, accelerator='cpu', logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=list(callbacks))


def fit(tmp_path, *callbacks, epochs=2, **options):
    module = Classifier()
    run = trainer(tmp_path, *callbacks, epochs=epochs)
    run.fit(module, loader(), loader(), **options)
    return module, run


def assert_same(module, stock):
    assert module.losses == pytest.approx(stock.losses, rel=1e-10)
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_fit_equals_stock(tmp_path):
    stock, of_stock = fit(tmp_path / 'stock', HoldNorms())
    module, run = fit(tmp_path / 'tune', TuneMode(norm_eval=True))
    assert_same(module, stock)
    assert run.callback_metrics['val_loss'] == pytest.approx(
        of_stock.callback_metrics['val_loss'])
    assert set(latest_runs(module).values()) == {'fused'}
    # The latest forward validated.
    assert activation_runs(module) == {'backbone.2': 'stock'}


def test_norms_that_train(tmp_path):
    stock, _ = fit(tmp_path / 'stock')
    module, _ = fit(tmp_path / 'tune', TuneMode())
    assert_same(module, stock)


@pytest.mark.parametrize('first', [True, False])
def test_frozen_by_base_finetuning(tmp_path, first):
    stock, _ = fit(tmp_path / 'stock', Freeze(), HoldNorms())
    tune = TuneMode(norm_eval=True)
    callbacks = (tune, Freeze()) if first else (Freeze(), tune)
    module, _ = fit(tmp_path / 'tune', *callbacks)
    assert_same(module, stock)
    assert set(latest_runs(module).values()) == {'fused'}


def test_resumed(tmp_path):
    whole, _ = fit(tmp_path / 'whole', TuneMode(norm_eval=True), epochs=3)
    _, run = fit(tmp_path / 'first', TuneMode(norm_eval=True), epochs=2)
    path = run.checkpoint_callback.best_model_path
    resumed, _ = fit(tmp_path / 'second', TuneMode(norm_eval=True), epochs=3,
                     ckpt_path=path)
    assert resumed.losses == pytest.approx(whole.losses[-3:])
    keys = torch.load(path, weights_only=True)['state_dict'].keys()
    assert keys == Classifier().state_dict().keys()


@pytest.mark.parametrize('call', ['validate', 'test', 'predict'])
def test_without_a_fit(tmp_path, call):
    module = Classifier()
    stock = copy.deepcopy(module)
    results = [
        getattr(trainer(tmp_path, *callbacks), call)(each, loader())
        for each, callbacks in ((stock, ()), (module, (TuneMode(), )))
    ]
    torch.testing.assert_close(*results)
    assert set(latest_runs(module).values()) == {'fused'}


def test_only_named_modules(tmp_path):
    module = Classifier()
    trainer(tmp_path, TuneMode('backbone')).validate(module, loader())
    assert len(latest_runs(module)) == 2


def test_nothing_to_turn_on(tmp_path):
    module = Classifier(has_blocks=False)
    run = trainer(tmp_path, TuneMode())
    with pytest.warns(UserWarning, match='runs as stock'):
        run.fit(module, loader(), loader())
    assert len(module.losses) == 6


@pytest.mark.parametrize('options, message', [
    (dict(mode='Tuned'), 'must be one of'),
    (dict(mode='Deploy'), 'must not be .Deploy. in a callback'),
    (dict(norm_eval='yes'), '`norm_eval` must be'),
    (dict(activations=None), '`activations` must be'),
    (dict(mode='Train', norm_eval=True), 'must not be True in mode'),
])
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TuneMode(**options)


def test_wrong_name(tmp_path):
    module = Classifier()
    before = repr(module)
    with pytest.raises(ValueError, match="names 'backbon'"):
        trainer(tmp_path, TuneMode('backbon')).fit(module, loader())
    assert repr(module) == before
