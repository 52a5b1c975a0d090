"""What each kind of layer is to Tune mode: a table a file."""
from mmtune.layers.activations import ACTIVATION_KINDS, ActivationKind
from mmtune.layers.convolutions import CONV_KINDS
from mmtune.layers.kinds import ConvKind, LayerKind, NormKind
from mmtune.layers.normalizations import NORM_KINDS

__all__ = [
    'ACTIVATION_KINDS', 'CONV_KINDS', 'NORM_KINDS', 'ActivationKind',
    'ConvKind', 'LayerKind', 'NormKind'
]
