"""What a newcomer tries, as far as no other test tries it."""
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmtune.hooks import TuneModeHook
from tests.processes import free_port
from tests.toy import TUNE, build_runner, losses

ROOT = Path(__file__).resolve().parents[1]
GET_STARTED = ROOT / 'docs/en/get_started.md'


def run(script, *arguments, **environment):
    """Return what a script prints, warnings too."""
    answer = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300)
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


# --------------------------------------------------------------------------
# A config in pure Python
# --------------------------------------------------------------------------


def test_config_of_the_new_style(tmp_path):
    """The page's own lines leave the base's hooks where they are."""
    snippet, = (block for block in re.findall(
        r'^```py\n(.*?)^```$', GET_STARTED.read_text(), re.DOTALL | re.M)
        if 'read_base' in block)
    base, = re.findall(r'from \.(\w+) import', snippet)
    (tmp_path / f'{base}.py').write_text(
        'from mmengine.hooks import CheckpointHook\n'
        'default_hooks = dict(\n'
        '    checkpoint=dict(type=CheckpointHook, interval=7))\n')
    path = tmp_path / 'tune.py'
    path.write_text(snippet)
    config = Config.fromfile(path)
    runner = build_runner(
        tmp_path, **{
            key: config[key]
            for key in ('default_hooks', 'efficient_conv_bn_eval')
        })
    intervals = [hook.interval for hook in runner.hooks
                 if type(hook).__name__ == 'CheckpointHook']
    assert intervals == [7]
    assert sum(type(hook) is TuneModeHook for hook in runner.hooks) == 1
    runner.train()
    assert len(losses(runner)) == 8


# --------------------------------------------------------------------------
# A run that goes on in another mode
# --------------------------------------------------------------------------


@pytest.mark.parametrize('before, after', [(TUNE, {}), ({}, TUNE)],
                         ids=['taken out', 'put in'])
def test_resumed_with_and_without_the_hook(before, after, tmp_path):
    def train(name, hooks, epochs, **options):
        runner = build_runner(
            tmp_path / name, default_hooks=hooks,
            train_cfg=dict(by_epoch=True, max_epochs=epochs), **options)
        runner.train()
        return runner

    whole = train('whole', before, 3)
    train('parts', before, 2)
    resumed = train('parts', after, 3, resume=True)
    assert len(losses(resumed)) == 4
    assert losses(resumed) == pytest.approx(losses(whole)[-4:], rel=1e-4)
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(
            states[1][name], value, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_by_the_launch_script(tmp_path):
    work_dir = tmp_path / 'work'
    # MMEngine's launcher asks for a GPU even where the backend is gloo.
    (tmp_path / 'on_cpu.py').write_text(
        'import torch\ntorch.cuda.set_device = lambda device: None\n')
    config = dict(
        build_runner(tmp_path / 'alone').cfg,
        custom_imports=dict(imports=['on_cpu', 'tests.toy']),
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        default_hooks=TUNE,
        work_dir=str(work_dir),
        model_wrapper_cfg=dict(
            type='mmtune.TuneModeDistributedDataParallel',
            modules=['backbone']))
    Config(config).dump(tmp_path / 'config.py')
    path = os.pathsep.join([str(Path(sys.executable).parent),
                            os.environ['PATH']])
    answer = subprocess.run(
        [ROOT / 'tools/dist_train.sh', tmp_path / 'config.py', '2'],
        env=dict(os.environ, PATH=path, PORT=str(free_port()),
                 PYTHONPATH=str(tmp_path)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300)
    assert answer.returncode == 0, answer.stdout
    # Eight images, in batches of two, on two processes; told by one of them.
    assert answer.stdout.count('Blocks in the first iteration: ') == 1
    saved = torch.load(work_dir / 'epoch_2.pth', weights_only=True)
    assert saved['meta']['iter'] == 4


# --------------------------------------------------------------------------
# A machine without a compiler
# --------------------------------------------------------------------------


def test_without_a_compiler(tmp_path):
    """It trains as it is, and says once what is missing."""
    empty = tmp_path / 'empty'
    empty.mkdir()
    output = run(
        """
        import copy, os, torch
        os.environ.pop('CXX', None)
        from torch import nn
        import mmtune
        stock = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).double().eval()
        model = copy.deepcopy(stock)
        mmtune.turn_on(model)
        x = torch.randn(2, 3, 128, 128).double()
        for net in (stock, model, model):
            net.zero_grad()
            net(x).square().mean().backward()
        for one, other in zip(stock.parameters(), model.parameters()):
            torch.testing.assert_close(one.grad, other.grad)
        print(set(mmtune.api.latest_runs(model).values()))
        """,
        PATH=str(empty),
        MMTUNE_NATIVE='',
        TORCH_EXTENSIONS_DIR=str(tmp_path / 'built'))
    assert output.count('found no C++ compiler') == 1
    assert output.splitlines()[-1] == "{'fused'}"


# --------------------------------------------------------------------------
# mmtune uninstalled
# --------------------------------------------------------------------------


def test_uninstalled(tmp_path):
    """A checkpoint needs no mmtune, and a config says what is missing."""
    build_runner(tmp_path, default_hooks=TUNE).train()
    output = run(
        """
        import sys
        sys.modules['mmtune'] = None  # makes an import of it fail
        import torch
        from mmengine.config import Config
        from mmengine.registry import HOOKS
        saved = torch.load(sys.argv[1], weights_only=False)
        print(*saved['state_dict'])
        config = Config.fromstring(saved['meta']['cfg'], '.py')
        try:
            HOOKS.build(config.default_hooks.tune_mode)
        except KeyError as error:
            print(error)
        """, tmp_path / 'epoch_2.pth')
    keys, message = output.splitlines()[-2:]
    stock = build_runner(tmp_path / 'stock').model
    assert keys.split() == list(stock.state_dict())
    assert 'mmtune.TuneModeHook is not in the' in message
