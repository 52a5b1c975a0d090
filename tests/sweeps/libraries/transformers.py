"""Hugging Face transformers: the models that keep running statistics.

With the defaults of their configs, but for at most two layers of transformer.
"""
import importlib
import inspect
import re
from pathlib import Path

import torch
from torch import nn

from tests.sweeps.libraries import first_of, images, representatives

REQUIREMENTS = ('transformers==5.24.0', 'timm==1.0.31', 'torchvision==0.28.0')
ALONE = ()
SIZES = (64, 128, 224, 256, 384)

LAYERS = ('num_hidden_layers', 'encoder_layers', 'decoder_layers',
          'num_layers')
# They name layers.
OF_LAYERS = {'out_indices', 'neck_hidden_sizes'}
# What a config leaves open.
SETTINGS = {
    'Beit': dict(out_indices=[0, 1, 2, 3], num_hidden_layers=4),
    'Data2Vec': dict(out_indices=[1, 2, 3, 4], num_hidden_layers=4),
    'Emu3VQVAE': dict(base_channels=32),
    'Informer': dict(prediction_length=4, context_length=24),
    'PatchTST': dict(num_input_channels=3),
    'PerceiverForImageClassificationConvProcessing': dict(
        num_cross_attention_heads=1),
    'TimmBackbone': dict(backbone='resnet18', use_pretrained_backbone=False),
    'Wav2Vec2Conformer': dict(vocab_size=10),
}
WITHOUT_DEFAULTS = ('Emu3ForConditionalGeneration', 'Emu3Model',
                    'PerceiverForImageClassificationFourier',
                    'PerceiverForMultimodalAutoencoding',
                    'PerceiverForOpticalFlow', 'PPOCRV5ServerDet',
                    'PPOCRV6MediumDet', 'Sapiens2For', 'UVDocBridge',
                    'VitMatte')


def names() -> list[str]:
    import transformers
    root = Path(transformers.__file__).parent / 'models'
    files = [path.relative_to(root).with_suffix('')
             for path in sorted(root.glob('*/modeling_*.py'))
             if re.search('BatchNorm|running_mean', path.read_text())]
    found = []
    for file in files:
        module = importlib.import_module(
            f'transformers.models.{file.parent}.{file.stem}')
        found += [name for name in module.__all__
                  if hasattr(getattr(module, name), 'config_class')
                  and not name.endswith('PreTrainedModel')]
    return representatives(found, build)


def build(name: str) -> nn.Module:
    import transformers
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError('transformers does not export it')
    if name.startswith(WITHOUT_DEFAULTS):
        raise ValueError('its config has no defaults that build it')
    config = kind.config_class(**next(
        (value for key, value in SETTINGS.items() if name.startswith(key)),
        {}))
    for part in (config, *vars(config).values()):
        for layers in LAYERS:
            number = getattr(part, layers, None)
            if isinstance(number, int) and not OF_LAYERS & vars(part).keys():
                setattr(part, layers, min(number, 2))
    model = kind(config)
    for module in model.modules():
        if hasattr(module, '_requires_grad'):
            # Else it wants to be first to ask for the input's gradient.
            module._requires_grad = False
    return model


def inputs(name: str, model: nn.Module, size: int) -> tuple:
    config = model.config
    asked = [*inspect.signature(model.forward).parameters][:2]
    if name.startswith(('EfficientLoFTR', 'SuperGlue')):
        return torch.randn(2, 2, 3, size, size),
    if name.startswith('Clap'):
        sound = torch.randn(2, 1, 1001, 64), torch.tensor([[False], [False]])
        return sound if asked[0] != 'input_ids' else (words(), *sound)
    if asked == ['input_ids', 'pixel_values']:
        return words(), images(size)
    if name.startswith('SpeechT5ForTextToSpeech'):
        return words(), None, torch.randn(2, size, config.num_mel_bins)
    if asked[0] == 'input_ids':
        return words(),
    if asked[0] == 'input_values':
        return torch.randn(2, 4000),
    if asked[0] == 'past_values':
        return torch.randn(2, config.context_length,
                           config.num_input_channels),
    if name.startswith('GraniteSpeech5'):
        first = first_of(model, nn.Linear)
        return torch.randn(2, size, first.in_features),
    if name.endswith('CTCEncoder'):
        return torch.randn(2, size, config.input_dim),
    if asked[0] == 'input_features':
        encoder = getattr(config, 'encoder_config', config)
        return torch.randn(2, size, encoder.num_mel_bins),
    channels = getattr(config, 'num_channels', 3)
    if name.endswith('EncoderWithSVTR'):
        channels = first_of(model, nn.Conv2d).in_channels
    return images(size, channels),


def words() -> torch.Tensor:
    return torch.randint(1, 10, (2, 12))
