"""MMPose: parts of its configs in which every class of module occurs."""
from tests.sweeps import openmmlab

REQUIREMENTS = ('json-tricks==3.17.3', 'munkres==3.0.0', 'torchvision==0.28.0')
ALONE = ('mmpose==1.3.2', )
SIZES = openmmlab.SIZES
names, build, inputs = openmmlab.functions(
    'mmpose',
    absent=('xtcocotools', 'xtcocotools.coco', 'xtcocotools.cocoeval',
            'xtcocotools.mask'))
