"""tools/analysis_tools, run on real configs and on plain models."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mmcv
import pytest
import torch
from matplotlib.colors import to_rgb
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmtune.analysis.plots import BLOCK_COLORS, MODE_COLORS
from mmtune.analysis.sources import build_model, load_config
from mmtune.analysis.steps import Step
from mmtune.api import latest_runs
from tests.oracle import randomize

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools/analysis_tools'
CONFIGS = ROOT / 'configs'
RETINANET = CONFIGS / 'retinanet/retinanet_r50_fpn_tune-1x_coco.py'
FASTER_RCNN = CONFIGS / 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
RTMDET = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
DETECTORS = 'mmdet::detectors/detectors_cascade-rcnn_r50_1x_coco.py'


def load_tool(name):
    """Import a tool, which looks for its neighbours on the path."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a tool in an empty folder; returns its JSON and what it printed."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        command = [f'{name}.py', *arguments, '--json', 'out/found.json']
        if name in ('benchmark_modes', 'estimate_memory'):
            command += ['--device', 'cpu']
        monkeypatch.setattr(sys, 'argv', list(map(str, command)))
        tool = load_tool(name)
        tool.run(tool.main)
        return (json.loads(Path('out/found.json').read_text()),
                capsys.readouterr().out)

    return run


def trained(config, path):
    """Save the vectors of a config's model as if it had been trained."""
    model = randomize(build_model(load_config(str(config))))
    # Without the weights, which are large.
    state_dict = {k: v for k, v in model.state_dict().items() if v.dim() < 2}
    torch.save(dict(state_dict=state_dict), path)
    return state_dict


def scales(state_dict, eps=1e-5):
    """|gamma| / sqrt(var + eps) of every BatchNorm in a state dict."""
    return {
        key.removesuffix('.running_var'):
        (state_dict[key.replace('running_var', 'weight')].double()
         / (variance.double() + eps).sqrt()).abs()
        for key, variance in state_dict.items()
        if key.endswith('.running_var')
    }


def shows(path, color):
    """Tell whether something is drawn in a color of matplotlib's."""
    picture = mmcv.imread(str(path), channel_order='rgb')
    wanted = [round(255 * level) for level in to_rgb(color)]
    return (abs(picture.astype(int) - wanted).max(axis=2) <= 1).sum() > 20


# ----------------------------------------------------------------------------
# inspect_conv_bn.py
# ----------------------------------------------------------------------------


@pytest.mark.parametrize('config, runs, learning', [
    (RETINANET, {'Tune': 53}, {'Tune': 42}),
    (FASTER_RCNN, {'Tune': 53}, {'Tune': 42}),
    (RTMDET, {'BN trains': 76}, {'BN trains': 76}),
    (DETECTORS, {'Tune': 80, 'left out': 26}, {'Tune': 58, 'left out': 26}),
], ids=['RetinaNet', 'Faster R-CNN', 'RTMDet', 'DetectoRS'])
def test_inspect_a_config(run, config, runs, learning):
    found, shown = run('inspect_conv_bn', config, '--plot', 'plots/blocks.png')
    assert found['totals']['runs'] == runs
    assert found['totals']['learning'] == learning
    assert found['totals']['blocks'] == len(found['blocks'])
    for how in ('Tune', 'BN trains', 'left out'):
        assert shows('plots/blocks.png', BLOCK_COLORS[how]) == (how in runs)
    stock = build_model(load_config(str(config)))
    norms = {
        name: module
        for name, module in stock.named_modules()
        if isinstance(module, _BatchNorm)
    }
    assert found['activations'] == [
        name for name, module in stock.named_modules()
        if isinstance(module, (nn.SiLU, nn.Hardsigmoid))
    ]
    assert sorted(row['bn'] for row in found['blocks']) == sorted(norms)
    for row in found['blocks']:
        norm, conv = norms[row['bn']], stock.get_submodule(row['conv'])
        assert row['out_channels'] == norm.num_features
        assert row['bn_is_fixed'] == (not norm.training)
        assert row['weight'] == dict(
            shape=list(conv.weight.shape),
            dtype='float32',
            learns=conv.weight.requires_grad)
        assert row['beta']['shape'] == [norm.num_features]
        assert row['bn'] in shown and row['reason'] in shown
    left_out = found['totals']['left_out']
    assert sum(left_out.values()) == runs.get('left out', 0)
    for reason, count in left_out.items():
        assert 'SAConv2d' in reason
        assert f'{count} left out: {reason}' in shown


def test_inspect_what_the_config_tunes(run):
    found, _ = run('inspect_conv_bn', RETINANET)
    assert found['options'] == dict(modules=['backbone'], mode='Tune')
    found, _ = run('inspect_conv_bn', RETINANET, '--modules',
                   'backbone.layer4')
    assert found['totals']['runs'] == {'Tune': 10}


def config_of(tmp_path, text, base=RETINANET):
    path = tmp_path / 'changed.py'
    path.write_text(f'_base_ = {str(base)!r}\n{text}\n')
    return path


KEY = 'efficient_conv_bn_eval'


@pytest.mark.parametrize('text, runs, says', [
    (f'{KEY} = dict(mode="Deploy")', {'Deploy': 53}, '53 blocks in Deploy'),
    (f'{KEY} = dict(mode="Eval")', {'Eval': 53}, '53 blocks in Eval mode'),
    (f'{KEY} = dict(begin=5)\nmodel = dict(backbone=dict(norm_eval=False))',
     {'Tune': 53}, 'how it is from epoch 5 on; before'),
    ('default_hooks = dict(tune_mode=dict(modules=None))', {'Tune': 53},
     '53 blocks in Tune'),
    ('model = dict(_delete_=True, type="mmtune.TuneModeModel",'
     ' architecture={{_base_.model}}, modules=["backbone"])', {'Tune': 53},
     '53 blocks in Tune'),
    ('default_hooks = dict(tune_mode=None)', {'Tune': 53},
     'Nothing in this config turns Tune mode on'),
], ids=['Deploy', 'Eval', 'begin', 'hook', 'model', 'nothing'])
def test_inspect_shows_the_mode_of_the_config(run, tmp_path, text, runs,
                                              says):
    found, shown = run('inspect_conv_bn', config_of(tmp_path, text))
    assert found['totals']['runs'] == runs
    assert says in shown
    assert ('Nothing in this' in shown) == ('Nothing' in says)


def test_inspect_an_option_on_which_the_run_would_stop(run, tmp_path):
    config = config_of(tmp_path, f'{KEY} = dict(module=["backbone"])')
    with pytest.raises(SystemExit, match='takes modules.*but got module'):
        run('inspect_conv_bn', config)


def test_inspect_a_plain_model_of_this_folder(run, tmp_path):
    (tmp_path / 'plain_net.py').write_text(
        'from torch import nn\n'
        'def net():\n'
        '    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False),\n'
        '                         nn.BatchNorm2d(4))\n')
    found, shown = run('inspect_conv_bn', '--model', 'plain_net:net')
    row, = found['blocks']
    assert row['bias'] is None and row['runs'] == 'BN trains'
    assert 'norm_eval=True' in shown


SMALL = ['--shape', '32', '32']


@pytest.mark.parametrize('tool, options, expected', [
    ('inspect_conv_bn', [], '1 block in Tune mode'),
    ('diagnose_checkpoint', [], '100.0% do not step too far'),
    ('benchmark_modes', [*SMALL, '--rounds', '1'], '1 folded'),
    ('benchmark_modes', [*SMALL, '--rounds', '0'],
     'MMEngine failed: ModuleNotFoundError'),
    ('estimate_memory', [*SMALL, '--gpu-memory', '1GB'],
     'fits in 0.93 GiB; the largest batch that does is'),
])
def test_plain_models_need_torch_alone(tool, options, expected, tmp_path):
    (tmp_path / 'net.py').write_text(
        'from torch import nn\n'
        'def net():\n'
        '    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))\n'
        '    model[1].running_var.fill_(4)\n'
        '    return model\n')
    # None in the place of a module makes its import fail.
    (tmp_path / 'sitecustomize.py').write_text(
        'import sys\n'
        'for name in ("mmcv", "mmdet", "mmengine", "rich", "matplotlib"):\n'
        '    sys.modules[name] = None\n')
    result = subprocess.run(
        [sys.executable,
         str(TOOLS / f'{tool}.py'), '--model', 'net:net', *options],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}'),
        capture_output=True,
        text=True)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    assert ' ...\n' in result.stderr


@pytest.mark.parametrize('arguments, message', [
    (['nowhere.py'], 'nowhere.py'),
    (['nowhere.txt'], 'nowhere.txt'),
    (['--model', 'torch.nn:Convolution'], "'Convolution'"),
    (['--model', 'nowhere:net'], 'nowhere'),
    (['--model', 'torch.nn:Conv2d'], 'must take no arguments'),
    (['--model', 'os:getcwd'], 'but returned str'),
    ([RETINANET, '--modules', 'backbne'], "'backbne'"),
    (['wrong.py'], "`model` cannot be built here: 'Retina is not in"),
])
def test_inspect_what_is_not_there(run, tmp_path, arguments, message):
    """A user sees a sentence, and no stack trace."""
    (tmp_path / 'wrong.py').write_text(
        'default_scope = "mmdet"\nmodel = dict(type="Retina")\n')
    with pytest.raises(
            SystemExit, match=rf'inspect_conv_bn.py: error: .*{message}'):
        run('inspect_conv_bn', *arguments)


def test_inspect_a_model_without_batchnorm(run):
    found, shown = run('inspect_conv_bn', '--model', 'torch.nn:Identity')
    assert found['blocks'] == [] and found['totals']['blocks'] == 0
    assert 'nothing to put into Tune mode' in shown


def test_inspect_a_model_whose_blocks_are_all_left_out(run, tmp_path):
    (tmp_path / 'left_net.py').write_text(
        'from torch import nn\n'
        'def net():\n'
        '    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))\n')
    found, shown = run('inspect_conv_bn', '--model', 'left_net:net', '--plot',
                       'a.png')
    row, = found['blocks']
    assert row['runs'] == 'left out' and row['reason'] in shown
    assert shows('a.png', BLOCK_COLORS['left out'])


@pytest.mark.parametrize('tool, arguments, message', [
    ('inspect_conv_bn', [], 'either a config or --model'),
    ('inspect_conv_bn', ['a.py', '--model', 'm:c'], 'either a config or'),
    ('diagnose_checkpoint', ['a.pth'], 'neither eps nor the order'),
    ('diagnose_checkpoint', [], 'neither eps nor the order'),
    ('diagnose_checkpoint', ['a.py', '--config', 'b.py'], 'one config'),
    ('diagnose_checkpoint', ['a.py', '--model', 'm:c'], 'either a config or'),
    ('benchmark_modes', [], 'either a config or --model'),
    ('estimate_memory', ['a.py', '--model', 'm:c'], 'either a config or'),
    ('benchmark_modes', ['a.py', '--modes', 'Trian'], "'trian'"),
    ('benchmark_modes', ['a.py', '--rounds', '-1'], '0 or more, but got -1'),
    ('benchmark_modes', ['a.py', '--shape', '0', '8'], "1 on, but got '0'"),
    ('benchmark_modes', ['a.py', '--batch-size', 'two'], "but got 'two'"),
    ('benchmark_modes', ['a.py', '--plot', 'a.foo'], "but got 'a.foo'"),
    ('benchmark_modes', ['a.py', '--plot', f'{__file__}/a.png'],
     'can be written'),
    ('diagnose_checkpoint', ['a.py', '--factor', '0.5'], '1 or more, but'),
    ('diagnose_checkpoint', ['a.py', '--factor', 'nan'], "but got 'nan'"),
    ('diagnose_checkpoint', ['a.py', '--lr', '0'], "but got '0'"),
    ('diagnose_checkpoint', ['a.py', '--lr', 'inf'], "but got 'inf'"),
    ('estimate_memory', ['a.py', '--batches', '1', '2'], 'three or more'),
    ('estimate_memory', ['a.py', '--batches', '1', '2', '2'], 'got 1 2 2'),
    *(('estimate_memory', ['a.py', '--gpu-memory', wrong], 'like 24GiB')
      for wrong in ('24', '24G', 'GiB', '0GiB', '1.2.3GiB')),
])
def test_arguments_that_do_not_go_together(run, capsys, tool, arguments,
                                           message):
    with pytest.raises(SystemExit):
        run(tool, *arguments)
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------
# diagnose_checkpoint.py
# ----------------------------------------------------------------------------


@pytest.mark.parametrize('config, optimizer, lr, frozen, left_out', [
    (RETINANET, 'SGD', .01, 11, 0),
    (FASTER_RCNN, 'SGD', .02, 11, 0),
    # Its head has one convolution for three BatchNorms.
    (RTMDET, 'Adam', .004, 0, 12),
], ids=['RetinaNet', 'Faster R-CNN', 'RTMDet'])
def test_diagnose_a_checkpoint(run, config, optimizer, lr, frozen, left_out):
    expected = scales(trained(config, 'trained.pth'))
    found, shown = run('diagnose_checkpoint', 'trained.pth', '--config',
                       config, '--plot', 'plots/scales.png')
    assert (found['optimizer'], found['lr']) == (optimizer, lr)
    assert sum(found['not_counted'].values()) == frozen
    assert sum(found['left_out'].values()) == left_out
    assert len(found['blocks']) + frozen + left_out == len(expected)
    for row in found['blocks']:
        coeff = expected[row['bn']]
        assert row['channels'] == len(coeff)
        assert row['coeff']['min'] == pytest.approx(coeff.min().item())
        assert row['coeff']['max'] == pytest.approx(coeff.max().item())
        assert row['gamma_learns']
        assert row['bn'] in shown
    coeff = torch.cat([expected[row['bn']] for row in found['blocks']])
    assert found['total']['channels'] == len(coeff)
    power = dict(SGD=2, Adam=1)[optimizer]
    too_far = (coeff**-power > 10).double().mean().item()
    assert 0 < too_far < 1
    assert found['total']['at_same_lr']['faster'] == pytest.approx(too_far)
    assert f'unstable: {too_far:.1%} of the channels step too far' in shown
    bound = 10 * coeff.min().item()**power
    assert found['total']['limits'][0]['lr'] == pytest.approx(bound)
    assert f'{bound * lr:.3g}' in shown
    assert shows('plots/scales.png', 'tab:blue')


def test_diagnose_the_weights_that_a_config_starts_from(run, tmp_path):
    backbone = dict(type='ResNet', depth=18, norm_eval=True)
    weights = str(tmp_path / 'backbone.pth')
    (tmp_path / 'stock.py').write_text(
        f'default_scope = "mmdet"\nmodel = {backbone!r}\n')
    expected = scales(trained(tmp_path / 'stock.py', weights))
    pretrained = dict(type='Pretrained', checkpoint=weights)
    (tmp_path / 'config.py').write_text(
        f'_base_ = "stock.py"\nmodel = dict(init_cfg={pretrained!r})\n')
    (tmp_path / 'loading.py').write_text(
        f'_base_ = "stock.py"\nload_from = {weights!r}\n')
    for name in ('config.py', 'loading.py'):
        found, _ = run('diagnose_checkpoint', name)
        assert found['optimizer'] == 'SGD' and found['lr'] is None
        assert len(found['blocks']) == len(expected) == 20
        coeff = torch.cat(list(expected.values()))
        assert found['total']['coeff']['min'] == pytest.approx(
            coeff.min().item())


def test_diagnose_a_plain_model_and_its_checkpoint(run, tmp_path):
    (tmp_path / 'other_net.py').write_text(
        'from torch import nn\n'
        'def net():\n'
        '    return nn.Sequential(\n'
        '        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1.),\n'
        '        nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))\n')
    torch.save({
        '1.weight': torch.tensor([.5, -1., 0., 2.]),
        '1.running_var': torch.full((4, ), 3.),
    }, 'weights.pth')
    found, shown = run('diagnose_checkpoint', 'weights.pth', '--model',
                       'other_net:net', '--factor', '15', '--lr', '0.1',
                       '--plot', 'scales.png')
    row, = found['blocks']
    assert (row['coeff']['min'], row['coeff']['max']) == (0, 1)
    assert row['zeros'] == 1
    assert row['at_same_lr'] == dict(slower=0, within=.5, faster=.5)
    assert row['limits'][0] == dict(share=1, lr=0)
    assert '2 channels, 1 of them at rest in Tune mode' in shown
    assert '2 of the 2 tensors in weights.pth fit the model' in shown
    assert found['not_counted'] == {
        'its statistics are those of a new BatchNorm': 1
    }
    assert shows('scales.png', 'tab:blue')


def test_diagnose_with_a_config_of_classes(run, tmp_path):
    (tmp_path / 'config.py').write_text(
        'from mmdet.models.backbones.resnet import ResNet\n'
        'from torch.optim import AdamW\n'
        'model = dict(type=ResNet, depth=18)\n'
        'optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-4))\n')
    trained('config.py', 'trained.pth')
    found, _ = run('diagnose_checkpoint', 'trained.pth', '--config',
                   'config.py')
    assert (found['optimizer'], found['lr']) == ('Adam', 1e-4)


def test_diagnose_another_optimizer(run, tmp_path):
    (tmp_path / 'config.py').write_text(
        'default_scope = "mmdet"\n'
        'model = dict(type="ResNet", depth=18)\n'
        'optim_wrapper = dict(optimizer=dict(type="Lion", lr=1e-4))\n')
    trained('config.py', 'trained.pth')
    command = ['diagnose_checkpoint', 'trained.pth', '--config', 'config.py']
    with pytest.raises(SystemExit, match='trains with Lion.*--optimizer SGD'):
        run(*command)
    found, _ = run(*command, '--optimizer', 'Adam')
    assert (found['optimizer'], found['lr']) == ('Adam', 1e-4)


def test_diagnose_a_model_that_deploy_cannot_fold(run):
    torch.save({'bn1.running_var': torch.ones(64)}, 'a.pth')
    Path('config.py').write_text(
        'default_scope = "mmdet"\n'
        'model = dict(type="ResNet", depth=18,\n'
        '             conv_cfg=dict(type="ConvAWS"))\n')
    with pytest.raises(
            SystemExit, match='into Deploy mode.*20 x ConvAWS2d makes a w'):
        run('diagnose_checkpoint', 'a.pth', '--config', 'config.py')


def test_diagnose_a_checkpoint_without_statistics(run):
    torch.save({'backbone.conv1.weight': torch.ones(64, 3, 7, 7)}, 'a.pth')
    with pytest.raises(
            SystemExit, match='no block to diagnose: .*those of a new Batch'):
        run('diagnose_checkpoint', 'a.pth', '--config', RETINANET)


# ----------------------------------------------------------------------------
# benchmark_modes.py
# ----------------------------------------------------------------------------

PAPERS_TUNE = 'Tune, stock activations'
MODES = ['Train', 'Eval', 'MMEngine', PAPERS_TUNE, 'Tune', 'Deploy']
TREES = CONFIGS / 'trees/retinanet_mobilenet-v2_fpn_tune-250i_trees.py'
TINY = ['--shape', '64', '96', '--batch-size', '2']


def resident(config, momenta, images):
    """Bytes of a stock model, of its optimizer's state, of its images."""
    model = build_model(load_config(str(config)))
    tensors = [*model.parameters(), *model.buffers()]
    learning = [p for p in model.parameters() if p.requires_grad]
    # A step is counted in a float for each of Adam's.
    counts = 4 * len(learning) if momenta == 2 else 0
    return (sum(tensor.nbytes for tensor in tensors)
            + momenta * sum(p.nbytes for p in learning) + counts
            + 4 * 3 * 64 * 96 * images)


@pytest.mark.parametrize('config, blocks, momenta', [
    pytest.param(RETINANET, 53, 1, marks=pytest.mark.exhaustive),
    pytest.param(FASTER_RCNN, 53, 1, marks=pytest.mark.exhaustive),
    (TREES, 52, 2),
], ids=['RetinaNet', 'Faster R-CNN', 'trees'])
def test_benchmark_a_config(run, config, blocks, momenta):
    modules = ['--modules', 'backbone']
    found, shown = run('benchmark_modes', config, *TINY, *modules, '--rounds',
                       '1', '--plot', 'plots/modes.png')
    modes = found['modes']
    assert list(modes) == MODES
    stock = modes['Eval']
    assert stock['resident'] == resident(config, momenta, 2)
    assert (stock['ratio'], stock['ratio_quartiles']) == (1, [1, 1])
    assert stock['off_eval'] == dict(loss=0, gradient=0)
    for mode, row in modes.items():
        assert row['seconds'] > 0
        assert mode in shown and f'{row["peak"] / 2**20:.1f}' in shown
        if mode != 'Train':
            assert row['off_eval']['loss'] < 1e-4
    assert modes['Train']['off_eval']['loss'] > 1e-3
    assert modes['Tune']['blocks'] == dict(fused=blocks)
    assert modes['Deploy']['blocks'] == dict(folded=blocks)
    assert modes['Deploy']['off_eval']['gradient'] is None
    assert modes['Tune']['kept'] < min(stock['kept'],
                                       modes['MMEngine']['kept'])
    if config != FASTER_RCNN:
        # Which samples a second stage draws is up to rounding.
        assert modes['Tune']['off_eval']['gradient'] < 1e-4
    for mode, color in MODE_COLORS.items():
        assert shows('plots/modes.png', color), mode


def test_benchmark_stock_activations(run):
    found, shown = run('benchmark_modes', TREES, *TINY, '--modules',
                       'backbone', '--modes', 'tune-stock-activations',
                       'tune', '--rounds', '0', '--plot', 'a.png')
    papers, tune = found['modes'][PAPERS_TUNE], found['modes']['Tune']
    assert papers['blocks'] == tune['blocks'] == dict(fused=52)
    assert papers['activations'] == {}
    assert tune['activations'] == {'one map': 35}
    assert tune['kept'] < papers['kept']
    assert tune['off_eval']['gradient'] < 1e-4
    assert PAPERS_TUNE in shown and '35 one map' in shown
    assert shows('a.png', MODE_COLORS[PAPERS_TUNE])


def test_benchmark_adversarial_examples(run):
    found, shown = run('benchmark_modes', TREES, *TINY, '--modules',
                       'backbone', '--modes', 'tune', 'DEPLOY', '--grad-to',
                       'input', '--rounds', '0', '--exact', '--plot', 'a.png')
    modes = found['modes']
    assert list(modes) == ['Eval', 'Tune', 'Deploy']
    for row in modes.values():
        assert row['off_float64']['gradient'] < 1e-4
        assert row['off_eval']['gradient'] < 1e-4
        assert 'seconds' not in row
    assert modes['Eval']['off_float64']['gradient'] > 0
    # No gradient is kept for a weight, and no momentum.
    assert modes['Eval']['resident'] == resident(TREES, 0, 2)
    assert modes['Tune']['kept'] < modes['Deploy']['kept']


def test_benchmark_under_autocast(run):
    full, _ = run('benchmark_modes', TREES, *TINY, '--modes', 'tune',
                  '--rounds', '0')
    found, _ = run('benchmark_modes', TREES, *TINY, '--modes', 'tune',
                   '--rounds', '0', '--amp')
    for mode in ('Eval', 'Tune'):
        half = found['modes'][mode]['kept'] / full['modes'][mode]['kept']
        assert .4 < half < .8
    assert 1e-4 < found['modes']['Tune']['off_eval']['gradient'] < .5


def test_a_config_that_trains_with_amp_is_measured_so(run, tmp_path):
    config = config_of(
        tmp_path, 'optim_wrapper = dict(type="AmpOptimWrapper")', TREES)
    run_it = ['benchmark_modes', config, *TINY, '--modes', 'eval',
              '--rounds', '0']
    kept = {}
    for option in ([], ['--amp'], ['--no-amp']):
        found, _ = run(*run_it, *option)
        assert found['amp'] == (option != ['--no-amp'])
        kept[tuple(option)] = found['modes']['Eval']['kept']
    assert kept[()] == kept['--amp', ] < kept['--no-amp', ]


def test_eval_is_stock_where_the_config_wraps_the_model(run, tmp_path):
    config = config_of(
        tmp_path, 'model = dict(_delete_=True, type="mmtune.TuneModeModel",'
        ' architecture={{_base_.model}}, modules=["backbone"],'
        ' norm_eval=True)', TREES)
    for name in (config, TREES):
        found, _ = run('benchmark_modes', name, *TINY, '--modes', 'eval',
                       'tune', '--rounds', '0')
        kept = [found['modes'][mode]['kept'] for mode in ('Eval', 'Tune')]
        assert found['modules'] == ['backbone']
        assert kept[1] < .9 * kept[0]
        if name == config:
            expected = kept
    assert kept == expected


def test_benchmark_goes_on_where_eval_does_not_fit(run, monkeypatch):
    memory = Step.memory

    def fit(step):
        if not latest_runs(step.model):
            raise torch.OutOfMemoryError('too large')
        return memory(step)

    monkeypatch.setattr(Step, 'memory', fit)
    found, shown = run('benchmark_modes', TREES, *TINY, '--modes', 'eval',
                       'tune', '--rounds', '1', '--plot', 'a.png')
    assert 'Eval failed: OutOfMemoryError: too large' in shown
    assert list(found['modes']['Eval']) == ['failed']
    tune = found['modes']['Tune']
    assert tune['seconds'] > 0 and 'ratio' not in tune
    assert shows('a.png', MODE_COLORS['Tune'])


def test_benchmark_where_nothing_fits(run, monkeypatch):

    def fail(step):
        raise torch.OutOfMemoryError('too large')

    monkeypatch.setattr(Step, 'memory', fail)
    found, _ = run('benchmark_modes', TREES, *TINY, '--modes', 'tune',
                   '--rounds', '1', '--plot', 'a.png')
    assert all(list(row) == ['failed'] for row in found['modes'].values())


@pytest.mark.slow
def test_benchmark_goes_on_where_mmengine_fails(run, tmp_path):
    (tmp_path / 'config.py').write_text(
        f'_base_ = {str(RETINANET)!r}\n'
        'model = dict(backbone=dict(depth=18, with_cp=True))\n'
        'model.update(neck=dict(in_channels=[64, 128, 256, 512]))\n')
    found, shown = run('benchmark_modes', 'config.py', *TINY, '--rounds', '1',
                       '--plot', 'modes.png')
    assert list(found['modes']) == MODES
    assert list(found['modes']['MMEngine']) == ['failed']
    assert 'MMEngine failed: TraceError: ' in shown
    assert found['modules'] == ['backbone']
    assert found['modes']['Tune']['ratio'] > 0
    assert shows('modes.png', MODE_COLORS['Tune'])
    assert not shows('modes.png', MODE_COLORS['MMEngine'])


def test_benchmark_a_model_whose_norms_train(run):
    found, shown = run('benchmark_modes', RTMDET, *TINY, '--modes', 'train',
                       'tune', '--rounds', '0')
    assert '76 of 76 BatchNorms are in train mode in a run' in shown
    assert found['modules'] is None
    tuned = found['modes']['Tune']
    assert tuned['blocks'] == dict(fused=76)
    assert tuned['off_eval']['loss'] < 1e-4
    assert tuned['kept'] < found['modes']['Eval']['kept']


@pytest.mark.parametrize('arguments, message', [
    (['nowhere.py'], 'nowhere.py'),
    ([RETINANET, '--modules', 'backbne'], "no submodule 'backbne'; it has"),
    (['--model', 'torch.nn:Identity'], 'no parameter'),
    (['--model', 'torch.nn:LazyBatchNorm2d'], 'waits for its first input'),
    (['--model', 'odd_net:two'], 'shape (2, 3, 64, 96) as its one argument'),
    (['--model', 'odd_net:nothing'], 'tensors of floats, but gave NoneType'),
    (['mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_'
      'semi-0.1-coco.py'], 'annotated images alone, but is a SoftTeacher'),
])
def test_benchmark_what_cannot_be(run, tmp_path, arguments, message):
    (tmp_path / 'odd_net.py').write_text(
        'from torch import nn\n'
        'class two(nn.Conv2d):\n'
        '    def __init__(self):\n'
        '        super().__init__(3, 2, 1)\n'
        '    def forward(self, x, y):\n'
        '        return x\n'
        'class nothing(two):\n'
        '    def forward(self, x):\n'
        '        return None\n')
    with pytest.raises(SystemExit) as raised:
        run('benchmark_modes', *arguments, *TINY)
    text = str(raised.value)
    assert text.startswith('benchmark_modes.py: error: ') and message in text


@pytest.mark.parametrize('config', [
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    pytest.param('mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
                 marks=pytest.mark.exhaustive),
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    pytest.param('mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
                 marks=pytest.mark.exhaustive),
])
@pytest.mark.slow
def test_benchmark_detectors_of_other_kinds(run, config):
    """Heads that change samples, boxes that learn, things beside stuff."""
    found, _ = run('benchmark_modes', config, '--shape', '128', '160',
                   '--batch-size', '1', '--modes', 'tune', '--rounds', '0',
                   '--modules', 'backbone')
    assert found['modes']['Tune']['off_eval']['loss'] < 1e-3


def test_benchmark_goes_on_where_nothing_can_be_compared(run, tmp_path):
    (tmp_path / 'zero_net.py').write_text(
        'from torch import nn\n'
        'class net(nn.Module):\n'
        '    def __init__(self):\n'
        '        super().__init__()\n'
        '        self.layers = nn.Sequential(\n'
        '            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(),\n'
        '            nn.LazyLinear(1))\n'
        '        self.layers(__import__("torch").ones(2, 3, 8, 8))\n'
        '    def forward(self, x):\n'
        '        return 0 * self.layers(x)\n')
    found, shown = run('benchmark_modes', '--model', 'zero_net:net', '--shape',
                       '8', '8', '--modes', 'tune', '--rounds', '0')
    assert found['modes']['Tune']['loss'] == 0
    assert found['modes']['Tune']['off_eval'] == dict(
        loss=None, gradient=None)


@pytest.mark.exhaustive
def test_benchmark_goes_on_without_float64(run):
    found, shown = run('benchmark_modes', FASTER_RCNN, '--shape', '64', '96',
                       '--modes', 'tune', '--rounds', '0', '--exact')
    assert 'Eval cannot be run in float64: ' in shown
    assert found['modes']['Tune']['off_float64']['gradient'] is None


def test_benchmark_a_plain_model_without_float64(run, tmp_path):
    (tmp_path / 'single_net.py').write_text(
        'from torch import nn\n'
        'class net(nn.Sequential):\n'
        '    def __init__(self):\n'
        '        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))\n'
        '    def forward(self, x):\n'
        '        return super().forward(x.float())\n')
    found, shown = run('benchmark_modes', '--model', 'single_net:net', *TINY,
                       '--modes', 'tune', '--rounds', '0', '--exact')
    assert 'in float64: the model must take float64 images' in shown
    assert found['modes']['Tune']['off_eval']['gradient'] < 1e-4


def test_no_times_where_bfloat16_is_computed_in_float32(run, monkeypatch):
    from mmtune.analysis import steps
    monkeypatch.setattr(steps, 'has_bfloat16_kernels', lambda: False)
    found, shown = run('benchmark_modes', TREES, *TINY, '--modes', 'tune',
                       '--rounds', '1', '--amp')
    assert 'Nothing is timed' in shown
    assert 'seconds' not in found['modes']['Tune']


# ----------------------------------------------------------------------------
# estimate_memory.py
# ----------------------------------------------------------------------------

WIDE = (
    'from torch import nn\n'
    'def net(width=32):\n'
    '    return nn.Sequential(\n'
    '        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),\n'
    '        nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),\n'
    '        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 9))\n')


@pytest.mark.parametrize('config', [
    RETINANET,
    pytest.param(FASTER_RCNN, marks=pytest.mark.exhaustive),
    RTMDET,
], ids=['RetinaNet', 'Faster R-CNN', 'RTMDet'])
def test_estimate_a_config(run, config):
    found, shown = run('estimate_memory', config, '--shape', '64', '96',
                       '--batches', '1', '2', '4', '--modes', 'tune',
                       '--gpu-memory', '24GiB', '--plot', 'plots/memory.png')
    assert list(found['modes']) == ['Eval', 'Tune']
    for mode, row in found['modes'].items():
        assert [run['batch'] for run in row['runs']] == [1, 2, 4]
        assert row['images'] == 16 * 4 * 3 * 64 * 96
        for measured in row['runs']:
            assert measured['peak'] >= max(measured['kept'] - row['images'],
                                           row['gradients'])
            assert measured['resident'] == (
                row['parameters'] + row['optimizer']
                + row['images'] // 16 * measured['batch'])
        assert f'{mode}: a batch of 16 takes' in shown
    if config != RTMDET:
        # Weights outweigh the maps of images so small.
        assert not found['modes']['Eval']['is_steady']
        assert found['modes']['Eval']['fits'] is None
        assert 'not yet in the feature maps' in shown
        assert 'a batch of 16 takes more than' in shown
        assert 'may or may not fit in 24.00 GiB' in shown
    assert 'no run on a GPU' in shown
    # Eval's line may be right below, where 24 GiB are the scale.
    for mode in ('MMEngine', 'Tune', 'Deploy'):
        assert shows('plots/memory.png', MODE_COLORS[mode]) == (
            mode in found['modes'])


@pytest.mark.parametrize('amp', [[], ['--amp']])
def test_an_estimate_is_what_is_measured(run, tmp_path, amp):
    (tmp_path / 'wide_net.py').write_text(WIDE)
    model = ['--model', 'wide_net:net', '--shape', '64', '64', *amp]
    estimated, _ = run('estimate_memory', *model, '--batch-size', '12')
    measured, _ = run('benchmark_modes', *model, '--batch-size', '12',
                      '--rounds', '0')
    assert list(estimated['modes']) == MODES
    for mode, row in estimated['modes'].items():
        assert row['is_affine'] and row['is_steady']
        there = measured['modes'][mode]
        total = there['peak'] + there['resident']
        assert row['total'] == pytest.approx(total, rel=.01)
        assert 'fits' not in row


@pytest.mark.parametrize('limit, fits, words', [
    ('100MiB', True, 'and fits in 0.10 GiB'),
    ('3MB', False, 'and does not fit in 0.00 GiB'),
])
def test_what_fits(run, tmp_path, limit, fits, words):
    (tmp_path / 'wide_net.py').write_text(WIDE)
    model = ['--model', 'wide_net:net', '--shape', '64', '64']
    found, shown = run('estimate_memory', *model, '--batch-size', '8',
                       '--gpu-memory', limit, '--modes', 'eval', 'tune')
    assert words in shown
    unit = dict(MiB=2**20, MB=10**6)[limit.lstrip('0123456789')]
    n_bytes = int(limit.rstrip('MiB')) * unit
    assert found['gpu_memory'] == n_bytes
    for row in found['modes'].values():
        assert row['fits'] is fits
        batch = row['largest_batch']
        assert (batch >= 8) == fits
        assert row['fixed'] + row['per_image'] * batch <= n_bytes
        assert row['fixed'] + row['per_image'] * (batch + 2) > n_bytes
        assert f'the largest batch that does is {batch}' in shown
    batches = [row['largest_batch'] for row in found['modes'].values()]
    assert batches[0] < batches[1] or not fits


AFFINE = [(1, 30), (2, 50), (3, 70)]


@pytest.mark.parametrize('totals, kept, small, limit, fits, says', [
    (AFFINE, 20, 0, 331, True, ['fits in', 'that does is 16']),
    (AFFINE, 20, 0, 329, False, ['does not fit in', 'that does is 15']),
    ([(1, 30), (2, 55), (3, 70)], 20, 0, 331, None,
     ['is not affine yet', 'run --batches 4 5 6', 'may or may not fit']),
    (AFFINE, 30, 0, 331, None,
     ['not yet in the feature maps', 'more than', 'is not known']),
    (AFFINE, 30, 0, 300, False, ['not yet in the feature', 'does not fit']),
    (AFFINE, 20, 7, 331, True, ['7 blocks ran as stock', 'fits in']),
])
def test_what_is_said_of_an_estimate(run, capsys, tmp_path, totals, kept,
                                     small, limit, fits, says):
    """Bytes in MiB at batches of 1 to 3, which grow by 20 an image."""
    tool = load_tool('estimate_memory')
    args = SimpleNamespace(
        batch_size=16, batches=[1, 2, 3], gpu_memory=limit * 2**20)
    found = tool.estimate(
        [dict(batch=batch, total=total * 2**20, kept=kept * batch * 2**20)
         for batch, total in totals], args)
    found['small'] = small
    assert found['fits'] is fits
    tool.warn('Tune', found, args)
    text = capsys.readouterr().out + tool.verdict('Tune', found, args)
    for words in says:
        assert words in text


# ----------------------------------------------------------------------------
# plot_modes.py
# ----------------------------------------------------------------------------


def plot(run, monkeypatch, *arguments):
    """Run plot_modes.py, which writes no JSON."""
    tool = load_tool('plot_modes')
    monkeypatch.setattr(sys, 'argv', ['plot_modes.py', *arguments])
    tool.run(tool.main)


def test_plot_what_the_tools_wrote(run, monkeypatch, tmp_path):
    (tmp_path / 'wide_net.py').write_text(WIDE)
    model = ['--model', 'wide_net:net', '--shape', '32', '32']
    pictures = []
    for name, options in (('benchmark_modes', ['--rounds', '1']),
                          ('estimate_memory', ['--gpu-memory', '1GiB'])):
        run(name, *model, *options, '--plot', f'{name}.png')
        Path('out/found.json').rename(f'{name}.json')
        plot(run, monkeypatch, f'{name}.json', '--out', 'plots/alone.png')
        pictures.append(mmcv.imread('plots/alone.png'))
        assert (pictures[-1] == mmcv.imread(f'{name}.png')).all()
    plot(run, monkeypatch, 'benchmark_modes.json', 'estimate_memory.json',
         '--out', 'plots/both.png')
    both = mmcv.imread('plots/both.png')
    assert both.shape[0] == sum(picture.shape[0] for picture in pictures)


@pytest.mark.parametrize('text, message', [
    ('{"blocks": []}', 'benchmark_modes.py or.*has blocks alone'),
    ('{}', 'has nothing alone'),
    ('{"modes": {}}', 'has modes alone'),
    ('[1]', r'has \[1\] alone'),
    ('PNG', 'other.json must be JSON, but has at line 1: Expecting value'),
    (None, 'other.json'),
])
def test_plot_what_no_tool_wrote(run, monkeypatch, text, message):
    if text is not None:
        Path('other.json').write_text(text)
    with pytest.raises(SystemExit, match=f'plot_modes.py: error: .*{message}'):
        plot(run, monkeypatch, 'other.json', '--out', 'a.png')
