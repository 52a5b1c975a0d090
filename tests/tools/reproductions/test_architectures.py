"""The page on architectures, with small ones and small images."""
import copy
import json
from unittest import mock

import mmcv
import pytest
from mmengine.logging import MMLogger
from reproductions import architectures
from reproductions.architectures import CLASSIFICATION, DETECTION, WHOLE

from mmtune.behaviours import convolution
from tests.tools.synthetic import doubted, filled, in_turn

MIB = 2**20


def row(name, kept, total=None, weights=10, setting=DETECTION, errors=()):
    """Kept and total MiB in Eval and Tune."""
    total = total or [k + 2 * weights for k in kept]
    modes = {
        mode: dict(kept=k * MIB, peak=(t - weights) * MIB,
                   resident=weights * MIB)
        for mode, k, t in zip(('Eval', 'Tune', 'MMEngine', 'Deploy'),
                              (*kept, *kept[1:] * 2),
                              (*total, *total[1:] * 2))
    }
    modes.update({mode: dict(error='KeyError') for mode in errors})
    return dict(name=name, setting=setting, parameters=weights * MIB,
                modes=modes)


def found_of(*rows):
    return dict(
        sizes={DETECTION: [2, 8, 8], CLASSIFICATION: [8, 4, 4],
               WHOLE: [2, 8, 8]},
        rows=list(rows))


@pytest.fixture(scope='module')
def measured():
    MMLogger.get_instance('reproduce', log_level='WARNING')
    with mock.patch.multiple(convolution, SMALL_MAP=0, SMALL_SHARE=0):
        with mock.patch.object(architectures, 'in_processes', in_turn):
            found = architectures.run(
                (1, 64, 96), (2, 32, 32), (1, 64, 96),
                ['ResNet-18', 'VGG-16 of SSD', 'ResNeSt-50'], ['YOLOX-S'])
    return json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.slow
def test_every_architecture_in_every_setting(measured):
    assert [(row['name'], row['setting']) for row in measured['rows']] == [
        *((name, setting)
          for name in ('ResNet-18', 'VGG-16 of SSD', 'ResNeSt-50')
          for setting in (DETECTION, CLASSIFICATION)), ('YOLOX-S', WHOLE)
    ]
    errors = {
        (row['name'], mode)
        for row in measured['rows'] for mode, step in row['modes'].items()
        if 'error' in step
    }
    assert {('VGG-16 of SSD', 'Tune'), ('ResNeSt-50', 'MMEngine')} <= errors
    assert all(mode != 'Eval' and name != 'ResNet-18'
               for name, mode in errors)


@pytest.mark.slow
def test_a_resnet_saves_the_outputs_of_its_convolutions(measured):
    first = measured['rows'][0]
    # Its BatchNorms and its linear layer are as in ImageNet's.
    assert first['parameters'] == 4 * (11_689_512 - 513_000)
    pixels = 32 * 48
    maps = 64 * pixels + 4 * 64 * pixels // 4
    for planes in (128, 256, 512):
        pixels //= 4
        # Two blocks of two, and one on the shortcut.
        maps += 5 * planes * pixels // 4
    modes = first['modes']
    saved = modes['Eval']['kept'] - modes['Tune']['kept']
    assert saved == pytest.approx(4 * maps, rel=.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', ['ResNet-18', 'MobileNetV2', 'CSPNeXt-S', 'Swin-T'])
def test_count_without_content_is_that_of_the_cpu(name):
    there, here = (
        architectures.measure(name, DETECTION, (2, 64, 96), device)
        for device in ('meta', 'cpu'))
    assert there['parameters'] == here['parameters']
    for mode, taken in here['modes'].items():
        for key, value in taken.items():
            if isinstance(value, int):
                value = pytest.approx(value, rel=.01)
            assert there['modes'][mode][key] == value, (mode, key)


@pytest.mark.parametrize('deploy, tune', [(3, 0), (0, 0)])
def test_page_says_why_deploy_saves_less(deploy, tune):
    entry = row('a', (100, 50))
    entry['modes']['Deploy'].update(peak=110 * MIB, left_out=deploy)
    entry['modes']['Tune'].update(left_out=tune)
    found = found_of(entry)
    assert f'a {deploy} against {tune}.' in filled('architectures', found)
    explained = not any('leaves out more blocks' in claim
                        for claim in doubted('architectures', found))
    assert explained == (deploy > tune)
    assert architectures.less_in_deploy([row('a', (100, 50))]) == {}


@pytest.mark.slow
def test_page_of_a_real_run(measured, tmp_path):
    text = filled('architectures', measured)
    assert 'saving nothing: VGG-16 of SSD (no BatchNorm)' in text
    assert all(f'| {row["name"]} |' in text for row in measured['rows'])
    architectures.plot(measured, tmp_path / 'a.png')
    assert mmcv.imread(tmp_path / 'a.png').shape[1] == 960


def test_shares():
    entry = row('a', (100, 60), (200, 150))
    assert architectures.maps_to_weights(entry) == 10
    assert architectures.kept_saved(entry) == pytest.approx(.4)
    assert architectures.total_saved(entry) == pytest.approx(.25)
    assert architectures.foretold(.5, 3) == .25
    assert not architectures.reaches(entry)


@pytest.mark.parametrize('rows, says', [
    ([row('big', (400, 200)), row('small', (20, 10))],
     ['in 1 of 2 (backbone, as in detection)', 'which one does is 40.0',
      'which one does not is 2.0', 'enough, for none',
      '| small | backbone, as in detection | 2.0 | 12.0 | 20.0% |']),
    ([row('big', (400, 200))], ['in 1 of 1', 'does not is none']),
    ([row('flat', (400, 300))], ['in 0 of 1', 'enough, for flat (25.0%)',
                                 'one does is none']),
])
def test_where_the_claim_holds(rows, says):
    text = filled('architectures', found_of(*rows))
    assert all(part in text for part in says)


def test_page_says_how_well_shares_are_foretold():
    # Foretold: 0.5 * 10 / 13 of all, where it is 0.3.
    found = found_of(row('a', (100, 50), (120, 84)))
    assert 'off by 8.5 percentage points at most, by 8.5 on' in filled(
        'architectures', found)


def test_page_shows_exceptions():
    found = found_of(
        row('a', (400, 200)), row('b', (40, 20), errors=['MMEngine']),
        row('c', (9, 9), errors=['Tune', 'Deploy'], setting=CLASSIFICATION))
    unchanged = copy.deepcopy(found)
    text = filled('architectures', found)
    assert found == unchanged
    assert text.index('| a |') < text.index('| b |')
    assert '| 50.0% | 33.3% | no | KeyError | 33.3% |' in text
    assert '| KeyError | KeyError | no |' in text
    assert 'saving nothing: c (KeyError).' in text
