"""MMDetection: parts of its configs in which every class of module occurs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('mmdet==3.3.0', 'mmpretrain==1.2.0', 'ftfy==6.3.1',
                'timm==1.0.31', 'torchvision==0.28.0')
ALONE = ()
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions('mmdet')
