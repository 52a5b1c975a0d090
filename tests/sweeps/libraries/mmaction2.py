"""MMAction2: every backbone, neck and head of its configs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('einops==0.8.2', 'importlib-metadata==10.2.0',
                'torchvision==0.28.0')
ALONE = ('mmaction2==1.2.0', )
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions(
    'mmaction', absent=('mmaction.models.localizers.drn',
                        'mmaction.models.localizers.drn.drn'))
