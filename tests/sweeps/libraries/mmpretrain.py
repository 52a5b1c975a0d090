"""MMPretrain: parts of its configs in which every class of module occurs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('mmpretrain==1.2.0', 'ftfy==6.3.1', 'torchvision==0.28.0')
ALONE = ()
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions('mmpretrain')
