"""MMSegmentation: backbones in which every class of module occurs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('mmsegmentation==1.2.2', 'mmpretrain==1.2.0', 'ftfy==6.3.1',
                'regex==2026.11.19', 'torchvision==0.28.0')
ALONE = ()
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions('mmseg', ('backbone', ))
