"""MMYOLO: parts of its configs in which every class of module occurs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('prettytable==3.18.0', 'torchvision==0.28.0')
ALONE = ('mmyolo==0.6.0', )
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions('mmyolo', told='2.0.1')
