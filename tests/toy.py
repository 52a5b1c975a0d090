"""A small model and data for whole runs of MMEngine's runners."""
import uuid
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from tests.oracle import randomize


@MODELS.register_module()
class ToyClassifier(BaseModel):
    """Two Conv+BN blocks in ``backbone``, one in ``neck``, a linear head.

    Args:
        norm_eval (bool): Whether ``train()`` leaves the backbone's BNs in
            eval mode, as backbones of MMDetection do.
        act (str): Class of the activation between the backbone's blocks.
    """

    def __init__(self, norm_eval=True, data_preprocessor=None, act='ReLU'):
        super().__init__(data_preprocessor)
        torch.manual_seed(0)
        self.norm_eval = norm_eval
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8),
            getattr(nn, act)(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 2)
        randomize(self)

    def train(self, mode=True):
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, inputs, labels, mode='tensor'):
        x = self.neck(self.backbone(inputs)).mean((2, 3))
        logits = self.head(x)
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, labels))
        return logits.argmax(1)


@DATASETS.register_module()
class ToyImages(torch.utils.data.Dataset):

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(
            inputs=torch.randn(3, 8, 8, generator=generator),
            labels=index % 2)


def loader():
    return dict(
        dataset=dict(type='ToyImages'),
        batch_size=2,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False))


@METRICS.register_module()
class ToyAccuracy(BaseMetric):

    def process(self, data_batch, data_samples):
        predicted = torch.stack(data_samples)
        self.results.extend((predicted == data_batch['labels']).tolist())

    def compute_metrics(self, results):
        return dict(accuracy=sum(results) / len(results))


@HOOKS.register_module()
class RecordHook(Hook):
    """Keeps the loss of every iteration."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        self.losses.append(float(outputs['loss']))


def conv_bns(dtype=torch.float64):
    """Two Conv+BN blocks for three channels, in eval mode."""
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))).to(
                dtype).eval()


TUNE = dict(tune_mode=dict(type='mmtune.TuneModeHook'))


def build_runner(work_dir, flexible=False, validate=False, **options):
    """A runner on the toy; ``options`` are top-level keys of its config."""
    config = dict(
        model=dict(type='ToyClassifier'),
        work_dir=str(work_dir),
        train_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=.1, momentum=.9)),
        param_scheduler=[dict(type='LinearLR', end=6, by_epoch=False)],
        custom_hooks=[dict(type='RecordHook')],
        # Runners of one name are one and the same to MMEngine.
        experiment_name=str(uuid.uuid4()),
        env_cfg=dict(),
        randomness=dict(seed=0))
    if validate:
        config.update(
            val_dataloader=loader(),
            val_cfg=dict(),
            val_evaluator=dict(type='ToyAccuracy'))
    config.update(options)
    runner_type = FlexibleRunner if flexible else Runner
    return runner_type.from_cfg(Config(config))


def losses(runner):
    """The losses of a run, one an iteration."""
    hook, = (hook for hook in runner.hooks if isinstance(hook, RecordHook))
    return hook.losses


def logged(runner):
    """What a run wrote into its log file."""
    return Path(runner.log_dir, f'{runner.timestamp}.log').read_text()
