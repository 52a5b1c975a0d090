"""Runs of Hugging Face's Trainer in Tune mode, against stock ones."""
import logging

import pytest
import torch

from mmtune.api import latest_runs
from tests.oracle import randomize

transformers = pytest.importorskip('transformers')
pytest.importorskip('accelerate')
from mmtune.huggingface import TuneModeCallback  # noqa: E402 - where it is

pytestmark = pytest.mark.filterwarnings('ignore')
BLOCKS = 3


def build():
    """A small ResNet, of random weights."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type='basic',
        num_labels=2)
    return randomize(
        transformers.ResNetForImageClassification(config)).double()


class Images(torch.utils.data.Dataset):

    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 16, 16, generator=generator,
                            dtype=torch.float64)
        return dict(pixel_values=image, labels=index % 2)


class HoldNorms(transformers.Trainer):
    """What a user of stock modules does to fix statistics."""

    def training_step(self, model, *args, **kwargs):
        train = model.train

        def held(mode=True):
            train(mode)
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
            return model

        model.train = held
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            del model.train


def train(tmp_path, *callbacks, epochs=2, model=None, resume=None,
          trainer_type=transformers.Trainer):
    model = model or build()
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=epochs, use_cpu=True, report_to=[],
        per_device_train_batch_size=2, logging_steps=1, save_strategy='epoch',
        disable_tqdm=True, learning_rate=.01, eval_strategy='epoch',
        lr_scheduler_type='constant', seed=0)
    trainer = trainer_type(
        model, arguments, train_dataset=Images(), eval_dataset=Images(),
        callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry['loss'] for entry in trainer.state.log_history
              if 'loss' in entry]
    return model, losses


def assert_same_weights(model, stock):
    assert model.state_dict().keys() == stock.state_dict().keys()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_training_equals_stock(tmp_path):
    stock, expected = train(tmp_path / 'stock', trainer_type=HoldNorms)
    model, losses = train(tmp_path / 'tune', TuneModeCallback(norm_eval=True))
    assert losses == pytest.approx(expected, rel=1e-10)
    assert_same_weights(model, stock)
    assert list(latest_runs(model).values()) == ['fused'] * BLOCKS


def test_norms_that_train(tmp_path):
    stock, expected = train(tmp_path / 'stock')
    model, losses = train(tmp_path / 'tune', TuneModeCallback())
    assert losses == pytest.approx(expected, rel=1e-10)
    assert_same_weights(model, stock)


def test_resumed(tmp_path):
    whole, _ = train(tmp_path / 'a', TuneModeCallback(norm_eval=True))
    train(tmp_path / 'b', TuneModeCallback(norm_eval=True), epochs=1)
    resumed, _ = train(tmp_path / 'b', TuneModeCallback(norm_eval=True),
                       resume=True)
    assert_same_weights(resumed, whole)
    loaded = transformers.ResNetForImageClassification.from_pretrained(
        tmp_path / 'b' / 'checkpoint-6', dtype=torch.float64)
    assert_same_weights(loaded, whole)


def test_nothing_to_turn_on(tmp_path, caplog):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, image_size=16, patch_size=8, num_labels=2,
        hidden_act='relu')
    model = transformers.ViTForImageClassification(config).double()
    logger = logging.getLogger('transformers')
    logger.addHandler(caplog.handler)
    try:
        _, losses = train(tmp_path, TuneModeCallback(mode='Eval'),
                          model=model)
    finally:
        logger.removeHandler(caplog.handler)
    assert len(losses) == 6
    assert 'trains as stock' in caplog.text


@pytest.mark.parametrize('options, message', [
    (dict(mode='Tuned'), 'must be one of'),
    (dict(mode='Deploy'), 'must not be .Deploy. in a callback'),
    (dict(norm_eval='yes'), '`norm_eval` must be'),
    (dict(activations=None), '`activations` must be'),
])
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TuneModeCallback(**options)


def test_wrong_name(tmp_path):
    model = build()
    before = repr(model)
    with pytest.raises(ValueError, match="names 'backbone'"):
        train(tmp_path, TuneModeCallback('backbone'), model=model)
    assert repr(model) == before
