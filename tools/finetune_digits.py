"""Fine-tune an ImageNet network on handwritten digits, in the mode you name.

    python tools/model_converters/mobilenet_v2_to_mmdet.py
    python tools/finetune_digits.py --mode tune

The first line fetches the weights. The data come with scikit-learn.
"""
import argparse

import torch
from mmdet.models import MobileNetV2
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import TensorDataset

MODES = ('train', 'eval', 'tune')


class Classifier(BaseModel):
    """An ImageNet backbone, the mean of its last map, a linear layer."""

    def __init__(self, weights):
        super().__init__()
        init_cfg = weights and dict(type='Pretrained', checkpoint=weights)
        self.backbone = MobileNetV2(out_indices=(7, ), init_cfg=init_cfg)
        self.head = nn.Linear(1280, 10)

    def forward(self, images, labels, mode='tensor'):
        """Give scores, or what the Runner asks for in training and test."""
        features, = self.backbone(images)
        scores = self.head(features.mean(dim=(2, 3)))
        if mode == 'loss':
            return dict(loss=cross_entropy(scores, labels))
        if mode == 'predict':
            return (scores.argmax(dim=1) == labels).tolist()
        return scores


class Accuracy(BaseMetric):
    """The share of images whose digit was recognised."""

    def process(self, data_batch, data_samples):
        """Collect what the model predicted for a batch."""
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        """Give the share of all batches."""
        return dict(accuracy=sum(results) / len(results))


def load_data(size):
    """Give training and test digits, scaled to squares of that many pixels."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)
    gray = interpolate(pixels[:, None], size=(size, size), mode='bilinear')
    # As ImageNet's images: three channels, mean 0, standard deviation 1.
    images = ((gray - gray.mean()) / gray.std()).expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    parts = train_test_split(
        range(len(labels)), test_size=0.5, random_state=0, stratify=labels)
    return [TensorDataset(images[part], labels[part]) for part in parts]


def data_options(size, batch_size):
    """Tell a Runner what to train on, and how to test."""
    train_set, test_set = load_data(size)

    def loader(dataset, shuffle):
        return dict(
            dataset=dataset,
            batch_size=batch_size,
            sampler=dict(type='DefaultSampler', shuffle=shuffle),
            collate_fn=dict(type='default_collate'))

    return dict(
        train_dataloader=loader(train_set, shuffle=True),
        val_dataloader=loader(test_set, shuffle=False),
        val_cfg=dict(),
        val_evaluator=dict(type=Accuracy))


def build_runner(mode, seed=0, epochs=3, lr=1e-4, size=64, batch_size=32,
                 weights='checkpoints/mobilenet_v2_imagenet.pth',
                 work_dir='work_dirs/digits', log_level='INFO',
                 activations=True):
    """Set up a run, which ``train()`` starts."""
    return Runner(
        # A dict, which the Runner builds after it has set the seed.
        model=dict(type=Classifier, weights=weights),
        work_dir=f'{work_dir}/{mode}',
        **data_options(size, batch_size),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=lr)),
        param_scheduler=dict(
            type='CosineAnnealingLR',
            T_max=epochs,
            convert_to_iter_based=True),
        # All that concerns mmtune; norm_eval keeps ImageNet's statistics.
        custom_hooks=[dict(
            type='mmtune.TuneModeHook',
            modules=['backbone'],
            mode=mode,
            norm_eval=mode != 'train',
            activations=activations)],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=10)),
        log_level=log_level,
        randomness=dict(seed=seed))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--mode', default='tune', choices=MODES)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--lr', type=float, default=1e-4)
    parser.add_argument('--size', type=int, default=64, help='of images')
    parser.add_argument('--work-dir', default='work_dirs/digits')
    build_runner(**vars(parser.parse_args())).train()


if __name__ == '__main__':
    main()
