"""The sweep's own code, on networks of a few layers."""
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmtune
from tests.sweeps import __main__ as runner
from tests.sweeps import environment, isolation, libraries, oracle

ROOT = Path(__file__).resolve().parents[2]
IMAGE = (2, 3, 8, 8)


def block(conv=None, norm=None):
    return nn.Sequential(conv or nn.Conv2d(3, 3, 3, padding=1),
                         norm or nn.BatchNorm2d(3), nn.ReLU())


def library_of(make, shape=IMAGE):
    """A library of one network."""
    return SimpleNamespace(
        SIZES=(8, ),
        build=lambda name: make(),
        inputs=lambda name, model, size: (torch.randn(shape), ))


def compare(make, **kwargs):
    return oracle.compare(library_of(make, **kwargs), 'network')


class Frozen(nn.Module):
    """A frozen BatchNorm of a name that nobody knows."""

    def __init__(self, channels=3):
        super().__init__()
        for name, value in dict(weight=1., bias=0., running_mean=0.,
                                running_var=1.).items():
            self.register_buffer(name, torch.full((channels, ), value))

    def forward(self, x):
        def shaped(value):
            return value.reshape(1, -1, 1, 1)

        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * shaped(scale) + shaped(bias)


class OwnConv(nn.Module):
    """Convolves by a function: there is no layer to fold into."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(F.conv2d(x, self.weight))


class TwoReaders(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return dict(a=self.bn(y), b=[y.relu()])


class Tokens(nn.Module):

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


class GivesNothing(nn.Sequential):
    """As MMDetection's ResNet."""

    def train(self, mode=True):
        super().train(mode)


# name: what makes the network, shape of its input, eligible, fused
FUSED = {
    'two blocks': (lambda: nn.Sequential(block(), block()), IMAGE, 2, 2),
    'a frozen normalization': (lambda: block(norm=Frozen()), IMAGE, 1, 1),
    'train() gives nothing': (lambda: GivesNothing(block()), IMAGE, 1, 1),
    'tokens': (Tokens, (2, 3, 4), 1, 1),
    'two readers': (TwoReaders, IMAGE, 0, 0),
    'a block beside two readers': (
        lambda: nn.Sequential(block(), TwoReaders()), IMAGE, 1, 1),
}


@pytest.mark.parametrize('case', FUSED.values(), ids=FUSED)
def test_counts_what_is_fused(case):
    make, shape, eligible, fused = case
    outcome = compare(make, shape=shape)
    assert outcome == oracle.Outcome('equal', '', eligible, fused)


def test_a_block_left_out_has_its_reason():
    outcome = compare(lambda: nn.Sequential(block(), OwnConv()))
    assert (outcome.state, outcome.eligible, outcome.fused) == ('equal', 2, 1)
    (reason, count), = outcome.left_out.items()
    assert 'conv2d' in reason and count == 1


def test_where_nothing_is_turned_on_there_is_a_reason_too():
    outcome = compare(OwnConv)
    assert (outcome.state, outcome.eligible, outcome.fused) == ('equal', 1, 0)
    assert 'conv2d' in next(iter(outcome.left_out))


# --------------------------------------------------------------------------
# The oracle can fail
# --------------------------------------------------------------------------


def turn_on_and(change):
    """A mmtune that does something wrong to the model or to its report."""

    def turn_on(model):
        report = mmtune.turn_on(model)
        change(model, report)
        return report

    return turn_on


def nudge(name):

    def change(model, report):
        with torch.no_grad():
            model.get_parameter(name).flatten()[0].add_(1e-6)

    return change


def forget_a_row(model, report):
    report.rows.pop()


def draw(model, report):
    model.register_forward_hook(lambda *_: torch.rand(1) and None)


def lose_a_gradient(model, report):
    model[0][0].weight.register_hook(torch.zeros_like)



WRONG = {
    'a weight': (nudge('0.0.weight'), 'output 0'),
    'a bias': (nudge('1.1.bias'), 'output 0'),
    'a gradient': (lose_a_gradient, 'grad of 0.0.weight'),
    'the random state': (draw, 'random state'),
    'the report': (forget_a_row, 'no row for 1.1'),
}


@pytest.mark.parametrize('case', WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(case, monkeypatch):
    change, detail = case
    monkeypatch.setattr(oracle, 'turn_on', turn_on_and(change))
    outcome = compare(lambda: nn.Sequential(block(), block()))
    assert outcome.state == 'wrong'
    assert detail in outcome.detail


def test_what_is_said_to_be_fused_is_counted(monkeypatch):
    monkeypatch.setattr(oracle, 'turn_on', turn_on_and(
        lambda model, report: mmtune.turn_off(model)))
    monkeypatch.setattr(oracle, 'latest_runs', lambda model: {'1': 'fused'})
    outcome = compare(block)
    assert outcome.state == 'wrong'
    assert '1 is said to be fused' in outcome.detail


def test_what_mmtune_raises_is_found(monkeypatch):

    def turn_on(model):
        raise KeyError('conv')

    monkeypatch.setattr(oracle, 'turn_on', turn_on)
    outcome = compare(block)
    assert (outcome.state, outcome.eligible) == ('raised', 1)
    assert outcome.detail == "KeyError: 'conv'"


class Raises(nn.Module):

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        raise RuntimeError('of no use')


class Infinite(Raises):

    def forward(self, x):
        return self.bn(x) / 0


@pytest.mark.parametrize('make, state, detail', [
    (lambda: 1 // 0, 'skipped', 'ZeroDivisionError'),
    (Raises, 'skipped', 'RuntimeError: of no use'),
    (Infinite, 'skipped', 'not finite'),
    (lambda: nn.Conv2d(3, 3, 1), 'without', ''),
])
def test_what_cannot_be_compared(make, state, detail):
    outcome = compare(make)
    assert outcome.state == state
    assert detail in outcome.detail


def gives_no_reason():
    raise AssertionError


def lacks_a_file():
    raise OSError('no /home/me/lib/site-packages/package/weights.pth')


@pytest.mark.parametrize('make, line', [
    (gives_no_reason, 'AssertionError: raise AssertionError'),
    (lacks_a_file, 'OSError: no package/weights.pth'),
])
def test_a_reason_says_what_and_nothing_of_the_machine(make, line):
    assert compare(make).detail == line


# --------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------


def double(number, tell):
    return 2 * number


def hang(number, tell):
    tell('waiting')
    time.sleep(60)


def crash(number, tell):
    tell('falling')
    os._exit(3)


def test_a_process_gives_its_result():
    assert isolation.isolated(double, 2, seconds=30) == 4


@pytest.mark.parametrize('function, seconds, message', [
    (hang, .5, 'it took more than 0.5 seconds while waiting'),
    (crash, 30, 'the process ended with 3 while falling'),
])
def test_a_process_that_gives_none(function, seconds, message):
    with pytest.raises(isolation.Failed, match=message):
        isolation.isolated(function, 2, seconds=seconds)


@pytest.mark.parametrize('doing, state', [
    ('building', 'skipped'),
    ('running in Tune mode', 'raised'),
])
def test_a_crash_in_tune_mode_is_a_finding(doing, state, monkeypatch):

    def isolated(*args, seconds):
        raise isolation.Failed('the process ended with -11', doing)

    monkeypatch.setattr(runner, 'isolated', isolated)
    assert runner.try_one(None, 'network').state == state


# --------------------------------------------------------------------------
# Libraries, and what is kept
# --------------------------------------------------------------------------


@pytest.mark.parametrize('name', libraries.LIBRARIES)
def test_every_library_says_what_a_sweep_asks(name):
    module = libraries.library(name)
    assert module.__doc__
    assert all('==' in item for item in (*module.REQUIREMENTS, *module.ALONE))
    assert list(module.SIZES) == sorted(module.SIZES)
    assert all(map(callable, (module.names, module.build, module.inputs)))


@pytest.mark.parametrize('name, found', [
    ('tim', "but got 'tim'"),
    ('', 'as in `make sweep LIB=timm`'),
    ('__init__', "but got '__init__'"),
])
def test_a_wrong_library_is_told_in_a_sentence(name, found):
    with pytest.raises(SystemExit) as stopped:
        environment.main(name)
    line = str(stopped.value)
    assert line.startswith('LIB must be one of ') and line.endswith(found)
    assert all(library in line for library in libraries.LIBRARIES)


def test_an_environment_is_made_once(monkeypatch, tmp_path):
    commands = []

    def run(*command):
        commands.append(' '.join(map(str, command)))
        if '-m venv' in commands[-1]:
            packages = environment.packages_of(Path(command[-1]))
            packages.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environment, 'ROOT', tmp_path)
    monkeypatch.setattr(environment, 'run', run)
    for _ in range(2):
        environment.main('timm')
    venv, pip = commands[:2]
    assert len(commands) == 2 and venv.endswith('.venv-sweeps/timm')
    assert 'timm==' in pip and str(environment.CONSTRAINTS) in pip
    monkeypatch.setattr(libraries.library('timm'), 'ALONE', ('a==1', ))
    environment.main('timm')
    assert commands[-1].endswith('--no-deps a==1')


def test_smallest_networks_with_every_class_are_chosen():
    makes = dict(
        wide=lambda: block(nn.Conv2d(3, 3, 7)),
        narrow=block,
        reads=lambda: block(nn.Conv2d(3, len(
            torch.linspace(0, 1, 3).tolist()), 5)),
        linear=lambda: nn.Linear(3, 3),
        other=lambda: block(norm=Frozen()),
        broken=lambda: 1 // 0)
    chosen = libraries.representatives(makes, lambda name: makes[name]())
    assert sorted(chosen) == ['broken', 'narrow', 'other']


def test_results_are_kept_beside_those_of_others(monkeypatch, tmp_path):
    path = tmp_path / 'sweeps.json'
    monkeypatch.setattr(runner, 'RESULTS', path)
    found = {
        'a': oracle.Outcome('equal', '', 3, 1, {"no 'x'": 1, "no 'y'": 1}),
        'b': oracle.Outcome('wrong', 'output 0', 1, 1),
        'c': oracle.Outcome('skipped', 'no file'),
        'd': oracle.Outcome('without'),
    }
    module = SimpleNamespace(REQUIREMENTS=('rich==2', ), ALONE=())
    for name in ('two', 'one'):
        runner.keep(name, runner.record(name, module, found, 'abc'))
    results = json.loads(path.read_text())
    assert list(results) == ['one', 'two']
    result = results['one']
    assert result['commit'] == 'abc'
    assert result['networks'] == {'a': [3, 1], 'b': [1, 1]}
    assert result['left_out'] == {'no ...': [2, 'a']}
    assert result['wrong'] == {'b': 'output 0'}
    assert result['skipped'] == {'c': 'no file'}
    assert result['versions'] == {'rich': version('rich')}
    assert '[3, 1]' in path.read_text()
