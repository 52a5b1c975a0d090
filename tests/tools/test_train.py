"""tools/train.py and tools/test.py, run as a user runs them."""
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import mmcv
import mmdet
import numpy as np
import pytest
import torch
from mmengine.fileio import load

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / 'tools/train.py'
TEST = ROOT / 'tools/test.py'
MMDET_TRAIN = Path(mmdet.__file__).parent / '.mim/tools/train.py'
FASTER_RCNN = ROOT / 'configs/faster_rcnn'
TUNE = FASTER_RCNN / 'faster-rcnn_r50_fpn_tune-1x_coco.py'
EVAL = FASTER_RCNN / 'faster-rcnn_r50_fpn_1x_coco.py'


def run(*command):
    """Run a script with this Python; returns what subprocess.run does."""
    return subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, command)],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600)


def succeed(*command):
    result = run(*command)
    assert result.returncode == 0, result.stdout
    return result.stdout


def scalars(work_dir, name):
    """What the latest run in a work dir logged under a name."""
    log = max(work_dir.glob('*/vis_data/scalars.json'))
    lines = map(json.loads, log.read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    """A folder in COCO format: four images with two squares each."""
    folder = tmp_path_factory.mktemp('squares')
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(4):
        pixels = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
        for x, y in rng.integers(0, 40, (2, 2)).tolist():
            pixels[y:y + 24, x:x + 24] = 255
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=1,
                    bbox=[x, y, 24, 24],
                    area=24 * 24,
                    iscrowd=0))
        name = f'{image_id}.png'
        mmcv.imwrite(pixels, str(folder / 'images' / name))
        images.append(
            dict(id=image_id, file_name=name, width=64, height=64))
    (folder / 'boxes.json').write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=1, name='square')])))
    return folder


@pytest.fixture(scope='module')
def options(dataset):
    """``--cfg-options`` for two iterations an epoch on that folder."""
    settings = {
        'model.backbone.init_cfg': 'None',
        'model.roi_head.bbox_head.num_classes': 1,
        # Checkpoints a quarter of the size.
        'model.roi_head.bbox_head.fc_out_channels': 64,
        'train_cfg.max_epochs': 1,
        'default_hooks.logger.interval': 1,
        'randomness.seed': 0,
    }
    for split in ('train', 'val', 'test'):
        loader = f'{split}_dataloader'
        settings.update({
            f'{loader}.num_workers': 0,
            f'{loader}.persistent_workers': False,
            f'{loader}.dataset.data_root': f'{dataset}/',
            f'{loader}.dataset.ann_file': 'boxes.json',
            f'{loader}.dataset.data_prefix.img': 'images/',
            f'{loader}.dataset.metainfo.classes': '("square",)',
        })
        resize = 2 if split == 'train' else 1
        settings[f'{loader}.dataset.pipeline.{resize}.scale'] = '(64,64)'
        if split != 'train':
            settings[f'{split}_evaluator.ann_file'] = dataset / 'boxes.json'
    return ['--cfg-options', *(f'{k}={v}' for k, v in settings.items())]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, options):
    """Work dir and output of an epoch of training in Tune mode."""
    work_dir = tmp_path_factory.mktemp('tune')
    output = succeed(TRAIN, TUNE, '--work-dir', work_dir, '--auto-scale-lr',
                     *options)
    yield work_dir, output
    shutil.rmtree(work_dir)


@pytest.mark.slow
def test_train_in_tune_mode(trained):
    work_dir, output = trained
    losses = scalars(work_dir, 'loss')
    assert 'blocks in Tune mode' in output
    assert 'Scaling the original LR by 0.125' in output
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert len(scalars(work_dir, 'coco/bbox_mAP')) == 1


@pytest.mark.slow
def test_first_loss_equals_that_of_the_eval_twin(trained, options, tmp_path):
    succeed(TRAIN, EVAL, '--work-dir', tmp_path, '--auto-scale-lr', *options)
    tune, twin = (scalars(path, 'loss') for path in (trained[0], tmp_path))
    assert tune[0] == pytest.approx(twin[0], rel=1e-5)
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('script, value', [
    (TRAIN, []),
    pytest.param(TRAIN, ['epoch_1.pth'], marks=pytest.mark.exhaustive),
    pytest.param(MMDET_TRAIN, [], marks=pytest.mark.exhaustive),
    (MMDET_TRAIN, ['epoch_1.pth']),
], ids=['ours-auto', 'ours-path', 'mmdet-auto', 'mmdet-path'])
def test_resume(script, value, trained, options, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    value = [tmp_path / name for name in value]
    output = succeed(script, TUNE, '--work-dir', tmp_path, '--resume', *value,
                     *options, 'train_cfg.max_epochs=2')
    assert 'blocks in Tune mode' in output
    assert 'resumed epoch: 1, iter: 2' in output
    assert scalars(tmp_path, 'step')[:2] == [3, 4]
    assert (tmp_path / 'epoch_2.pth').is_file()
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('config', [TUNE, EVAL], ids=['tune', 'eval'])
def test_test(config, trained, options, tmp_path):
    work_dir, _ = trained
    succeed(TEST, config, work_dir / 'epoch_1.pth', '--work-dir', tmp_path,
            '--out', tmp_path / 'detections.pkl', '--show-dir', 'drawn',
            *options)
    metrics = load(next(tmp_path.glob('*/*.json')))
    expected = scalars(work_dir, 'coco/bbox_mAP')
    assert [metrics['coco/bbox_mAP']] == pytest.approx(expected, abs=0.01)
    assert len(load(tmp_path / 'detections.pkl')) == 4
    assert len(list(tmp_path.glob('*/drawn/*.png'))) == 4


@pytest.mark.slow
@pytest.mark.parametrize('arguments, error', [
    (['efficient_conv_bn_eval.modules=[backbon]'], r'backbon\b.*backbone\b'),
    (['load_from=missing.pth', 'resume=True'], r'missing\.pth'),
], ids=['module', 'checkpoint'])
def test_wrong_settings_stop_before_training(arguments, error, options,
                                             tmp_path):
    result = run(TRAIN, TUNE, '--work-dir', tmp_path, *options, *arguments)
    assert result.returncode == 1
    assert re.search(error, result.stdout.splitlines()[-1]), result.stdout
    assert 'Epoch(train)' not in result.stdout


@pytest.mark.slow
def test_amp_trains_on_gpu_alone(options, tmp_path):
    result = run(TRAIN, TUNE, '--work-dir', tmp_path, '--amp', *options)
    if torch.cuda.is_available():
        assert result.returncode == 0, result.stdout
        assert len(scalars(tmp_path, 'loss')) == 2
    else:
        assert result.returncode == 1
        assert 'only available training on gpu' in result.stdout
        assert 'Epoch(train)' not in result.stdout
    shutil.rmtree(tmp_path)


@pytest.fixture
def script(monkeypatch):
    """Import a script of tools/ and set its command line."""
    monkeypatch.syspath_prepend(str(TRAIN.parent))

    def import_script(path, *arguments):
        monkeypatch.setattr(sys, 'argv', [path.name, *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return import_script


@pytest.mark.parametrize('arguments, expected', [
    ([], dict(launcher='none', resume=False)),
    ([], dict(work_dir=f'work_dirs/{TUNE.stem}')),
    (['--work-dir', 'there'], dict(work_dir='there')),
    (['--cfg-options', 'work_dir=here'], dict(work_dir='here')),
    (['--work-dir', 'there', '--cfg-options', 'work_dir=here'],
     dict(work_dir='there')),
    (['--launcher', 'pytorch'], dict(launcher='pytorch')),
    (['--resume'], dict(resume=True, load_from=None)),
    (['--resume', 'a.pth'], dict(resume=True, load_from='a.pth')),
    (['--amp'], {'optim_wrapper.type': 'AmpOptimWrapper'}),
    (['--auto-scale-lr'], {'auto_scale_lr.enable': True}),
])  # yapf: disable
def test_train_arguments_reach_the_config(arguments, expected, script):
    train = script(TRAIN, TUNE, *arguments)
    args = train.parse_args()
    config = train.load_config(args)
    train.apply_train_options(config, args)
    assert {key: attrgetter(key)(config) for key in expected} == expected


def test_auto_scale_lr_needs_a_base_batch_size(script):
    train = script(TRAIN, TUNE, '--auto-scale-lr', '--cfg-options',
                   'auto_scale_lr=None')
    args = train.parse_args()
    config = train.load_config(args)
    with pytest.raises(ValueError, match='auto_scale_lr.base_batch_size=16'):
        train.apply_train_options(config, args)


def test_a_missing_config_is_named(script):
    train = script(TRAIN, 'configs/missing.py')
    with pytest.raises(FileNotFoundError, match='configs/missing.py'):
        train.main()


def test_out_must_be_a_pickle_file(script, dataset, options, tmp_path):
    test = script(TEST, TUNE, 'any.pth', '--work-dir', tmp_path, '--out',
                  'detections.json', *options)
    with pytest.raises(ValueError, match='pkl'):
        test.main()


@pytest.mark.parametrize('command, expected', [
    (['dist_train.sh', 'a.py', '4', '--amp'],
     ['--nproc_per_node=4', 'train.py a.py --launcher pytorch --amp']),
    (['dist_test.sh', 'a.py', 'a.pth', '4', '--out', 'a.pkl'],
     ['--nproc_per_node=4',
      'test.py a.py a.pth --launcher pytorch --out a.pkl']),
    (['slurm_train.sh', 'gpu', 'job', 'a.py', 'there', '--resume'],
     ['--partition=gpu --job-name=job --ntasks=8',
      'train.py a.py --work-dir there --launcher slurm --resume']),
])  # yapf: disable
def test_launch_scripts(command, expected, tmp_path):
    for name in ('python', 'srun'):
        stand_in = tmp_path / name
        stand_in.write_text('#!/bin/sh\necho "$@"\n')
        stand_in.chmod(0o755)
    environment = dict(
        os.environ, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    name, *arguments = command
    output = subprocess.run([TRAIN.with_name(name), *arguments],
                            env=environment,
                            check=True,
                            capture_output=True,
                            text=True).stdout
    assert all(part in output for part in expected), output


@pytest.mark.parametrize(
    'name', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_launch_scripts_say_what_is_missing(name):
    result = subprocess.run([TRAIN.with_name(name), 'a.py'],
                            capture_output=True,
                            text=True)
    assert result.returncode == 2
    assert result.stderr.startswith('usage: ')
