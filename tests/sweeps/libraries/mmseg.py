"""MMSegmentation: every backbone of its configs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('mmsegmentation==1.2.2', )
ALONE = ()
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions('mmseg', ('backbone', ))
