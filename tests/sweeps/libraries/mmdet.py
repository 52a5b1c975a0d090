"""MMDetection: every backbone, neck and head of its configs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('mmdet==3.3.0', )
ALONE = ()
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions('mmdet')
