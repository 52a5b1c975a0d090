"""MMDetection: parts of its configs in which every class of module occurs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('mmdet==3.3.0', )
ALONE = ()
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions('mmdet')
