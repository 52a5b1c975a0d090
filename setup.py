import os
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What `mim` and other users of an installed package look for in its `.mim`.
MIM_FILES = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Put configs, tools and model-index into the package's ``.mim`` folder.

    A wheel gets copies. An editable install, whose package is the source
    folder itself, gets links, so that edited configs take effect at once.
    """

    def run(self):
        super().run()
        package = ROOT if self.editable_mode else Path(self.build_lib)
        mim = package / 'mmtune' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in MIM_FILES:
            source = ROOT / name
            if self.editable_mode:
                (mim / name).symlink_to(os.path.relpath(source, mim))
            elif source.is_dir():
                shutil.copytree(
                    source,
                    mim / name,
                    ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, mim)


setup(
    name='mmtune',
    version=runpy.run_path(str(ROOT / 'mmtune' / 'version.py'))['__version__'],
    description='Tune mode for MMEngine and MMDetection: train with frozen '
    'batch statistics at the memory of folded Conv + BN blocks',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='mmtune contributors',
    license_expression='Apache-2.0',
    project_urls={'Paper': 'https://arxiv.org/abs/2305.11624'},
    keywords=[
        'batch normalization',
        'fine-tuning',
        'memory',
        'mmdetection',
        'object detection',
        'pytorch',
        'transfer learning',
    ],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: C++',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    packages=find_packages(include=('mmtune', 'mmtune.*')),
    package_data={'mmtune': ['csrc/*', 'py.typed']},
    python_requires='>=3.10',
    # `mmtune.turn_on` works on any nn.Module and needs torch alone. The Hook,
    # the configs and the tools belong to an MMDetection installation, which
    # is an extra: mmcv has wheels for few versions of torch, and a plain
    # `pip install mmtune` must not start compiling it from source.
    install_requires=['torch>=2.4'],
    extras_require={
        'mmdet': [
            'matplotlib',
            'mmcv>=2.0.0,<2.2.0',
            'mmdet>=3.3.0,<3.4.0',
            'mmengine>=0.10.7,<1.0.0',
            'numpy',
            'opencv-python>=3',
            'pycocotools',
            'rich',
        ],
        'tests': [
            'hypothesis',
            'onnx',
            'onnxscript',
            'packaging',
            'pytest',
            'pytest-xdist',
            'scikit-learn',
            'scipy',
            'tensorboard',
        ],
        # The callbacks `mmtune.lightning` and `mmtune.huggingface`.
        'lightning': ['lightning>=2.4'],
        'huggingface': ['accelerate', 'transformers>=4.50'],
        # The detectors of `python -m mmtune.analysis.device`.
        'device': ['torchvision'],
        'lint': ['mypy', 'ruff'],
        'docs': ['furo', 'myst-parser', 'sphinx'],
        'release': ['build', 'twine'],
    },
    cmdclass={'build_py': BuildWithMim})
