import itertools

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, MMDistributedDataParallel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import CheckpointLoader
from torch import nn

from mmtune.api import latest_runs
from mmtune.behaviours.activation import activation_runs
from mmtune.collect_env import native_status
from mmtune.deploy import FoldedNorm
from mmtune.hooks import tune_mode_hook
from mmtune.hooks.tune_mode_hook import _unwrapped
from tests import toy
from tests.toy import TUNE, build_runner, logged, losses

KEY = 'efficient_conv_bn_eval'


def train(*args, **options):
    runner = build_runner(*args, **options)
    runner.train()
    return runner


def assert_same_run(stock, tuned, tolerance=1e-5):
    assert len(losses(stock)) == len(losses(tuned)) > 0
    torch.testing.assert_close(
        losses(tuned), losses(stock), rtol=tolerance, atol=tolerance)
    states = stock.model.state_dict(), tuned.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(
            states[1][name], value, rtol=10 * tolerance, atol=10 * tolerance)


def test_is_found_without_custom_imports():
    hook = HOOKS.build(Config(TUNE).tune_mode)
    assert type(hook).__name__ == 'TuneModeHook'


WAYS = {
    'plain': {},
    'validation': dict(validate=True),
    'FlexibleRunner': dict(flexible=True),
    'FlexibleRunner with validation': dict(flexible=True, validate=True),
    'accumulation': dict(
        optim_wrapper=dict(
            type='OptimWrapper',
            accumulative_counts=2,
            clip_grad=dict(max_norm=1.),
            optimizer=dict(type='SGD', lr=.1))),
    'EMA': dict(
        validate=True,
        custom_hooks=[
            dict(type='RecordHook'),
            dict(type='EMAHook', ema_type='ExponentialMovingAverage')
        ]),
    'EMA with buffers': dict(
        validate=True,
        custom_hooks=[
            dict(type='RecordHook'),
            dict(type='EMAHook', momentum=0.2, update_buffers=True)
        ]),
    'BNs in train mode': dict(
        model=dict(type='ToyClassifier', norm_eval=False)),
    'activations': dict(
        validate=True, model=dict(type='ToyClassifier', act='SiLU')),
    'activations, BNs in train mode': dict(
        model=dict(type='ToyClassifier', act='SiLU', norm_eval=False)),
    'iterations': dict(
        validate=True,
        train_cfg=dict(by_epoch=False, max_iters=6, val_interval=2),
        default_hooks=dict(checkpoint=dict(
            type='CheckpointHook', by_epoch=False, interval=2))),
    'activation checkpointing': dict(activation_checkpointing=['backbone']),
    'compile': dict(compile=dict(backend='aot_eager')),
}


@pytest.mark.parametrize('options', WAYS.values(), ids=WAYS)
def test_runs_like_stock(options, tmp_path):
    stock = train(tmp_path / 'stock', **options)
    hooks = dict(options.get('default_hooks', {}), **TUNE)
    tuned = train(tmp_path / 'tuned', **{**options, 'default_hooks': hooks})
    assert_same_run(stock, tuned)
    runs = latest_runs(tuned.model)
    trained_bns = options.get('model', {}).get('norm_eval') is False
    validated = options.get('validate', False)
    backbone = 'fused' if validated or not trained_bns else 'train mode'
    assert runs['backbone.1'] == runs['backbone.4'] == backbone
    assert runs['neck.1'] == ('fused' if validated else 'train mode')
    assert (tmp_path / 'tuned' / 'last_checkpoint').exists()
    if validated:
        scalars = [
            next((tmp_path / name).glob('*/vis_data/scalars.json')).read_text()
            for name in ('stock', 'tuned')
        ]
        accuracies = [[
            line.split('accuracy')[1][:8] for line in text.splitlines()
            if 'accuracy' in line
        ] for text in scalars]
        assert accuracies[0] == accuracies[1] != []


def test_amp_wrapper_on_the_cpu(tmp_path):
    """AmpOptimWrapper wants an accelerator: autocast, as it would set it."""
    results = []
    for name, hooks in (('stock', {}), ('tuned', TUNE)):
        runner = build_runner(tmp_path / name, default_hooks=hooks)
        train_step = runner.model.train_step

        def autocast_step(data, optim_wrapper, train_step=train_step):
            with torch.autocast('cpu', torch.bfloat16):
                return train_step(data, optim_wrapper)

        runner.model.train_step = autocast_step
        runner.train()
        results.append(runner)
    assert_same_run(*results, tolerance=2e-2)
    assert latest_runs(results[1].model)['backbone.1'] == 'fused'


OPTIONS = {
    'no key': (None, {}, {'backbone.1', 'backbone.4', 'neck.1'}),
    'name': ('backbone', {}, {'backbone.1', 'backbone.4'}),
    'list': (['backbone', 'neck'], {}, {'backbone.1', 'backbone.4', 'neck.1'}),
    'dict': (dict(modules=['neck']), {}, {'neck.1'}),
    'dict without modules': (dict(mode='tune'), {},
                             {'backbone.1', 'backbone.4', 'neck.1'}),
    'another mode': (dict(mode='Eval'), {}, set()),
    'argument': (None, dict(modules='neck'), {'neck.1'}),
    'argument wins': (dict(modules=['backbone']), dict(modules=['neck']),
                      {'neck.1'}),
    'argument wins over mode': (dict(mode='Train', modules='neck'),
                                dict(mode='Tune'), {'neck.1'}),
}


@pytest.mark.parametrize(
    'key, arguments, expected', OPTIONS.values(), ids=OPTIONS)
def test_config_key_and_arguments(key, arguments, expected, tmp_path,
                                  monkeypatch):
    from mmengine.runner import runner as runner_module
    called = []
    monkeypatch.setattr(runner_module, 'turn_on_efficient_conv_bn_eval',
                        lambda *args: called.append(args))
    runner = train(
        tmp_path,
        default_hooks=dict(
            tune_mode=dict(type='mmtune.TuneModeHook', **arguments)),
        **({} if key is None else {KEY: key}))
    assert not called, 'the rewrite of MMEngine ran as well'
    assert set(latest_runs(runner.model)) == expected
    kept = Config.fromstring(
        torch.load(tmp_path / 'epoch_2.pth')['meta']['cfg'], '.py').get(KEY)
    assert kept == key == runner.cfg.get(KEY)


def test_norm_eval_by_key(tmp_path):
    runner = train(
        tmp_path,
        model=dict(type='ToyClassifier', norm_eval=False),
        default_hooks=TUNE,
        **{KEY: dict(modules=['backbone'], norm_eval=True)})
    assert set(latest_runs(runner.model).values()) == {'fused'}


WRONG = {
    'typo in a name': ('bakbone', {},
                       "`efficient_conv_bn_eval` names 'bakbone', but the"),
    'typo in a name of a dict': (dict(modules=['neck', 'bakbone']), {},
                                 "`efficient_conv_bn_eval` names 'bakbone'"),
    'no names of a dict': (dict(modules=[]), {}, 'at least one submodule'),
    'no names': (None, dict(modules=[]), '`modules` must name at least one'),
    'typo in an option': (dict(modul=['backbone']), {},
                          'activations, begin, but got modul'),
    'typo in the mode': (dict(mode='Tunes'), {}, "but got 'Tunes'"),
    'mode of a wrong type': (dict(mode=1), {}, '`mode` must be a name'),
    'activations of a wrong type': (dict(activations='SiLU'), {},
                                    '`activations` must be True or False'),
    'wrong argument': (None, dict(modules='bakbone'),
                       "`modules` names 'bakbone'"),
    'a switch for a name': (False, {}, 'must be a name, a list of names'),
}


@pytest.mark.parametrize('flexible', [False, True])
@pytest.mark.parametrize(
    'key, arguments, message', WRONG.values(), ids=WRONG)
def test_mistakes_stop_before_training(key, arguments, message, flexible,
                                       tmp_path):
    runner = build_runner(
        tmp_path,
        flexible,
        default_hooks=dict(
            tune_mode=dict(type='mmtune.TuneModeHook', **arguments)),
        **({} if key is None else {KEY: key}))
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert losses(runner) == []


@pytest.mark.parametrize('name', [
    'efficient_conv_bn_evl', 'eficient_conv_bn_eval',
    'efficient_conv_bn_eval_'])
def test_a_misspelled_key_is_noticed(name, tmp_path):
    runner = build_runner(
        tmp_path, default_hooks=TUNE, **{name: ['backbone']})
    with pytest.raises(ValueError, match=f'`{name}`.*write `{KEY}`'):
        runner.train()
    assert losses(runner) == []


@pytest.mark.parametrize('options', [
    dict(conv_bn_eval=['backbone']),
    {KEY: ['backbone'], 'efficient_conv_bn_eval_': ['neck']},
], ids=['another key', 'beside the key'])
def test_other_keys_are_nobodys_business(options, tmp_path):
    assert losses(train(tmp_path, default_hooks=TUNE, **options))


@pytest.mark.parametrize('flexible', [False, True])
@pytest.mark.parametrize('mode', ['Tune', 'Deploy'])
def test_nothing_to_turn_on_is_a_warning(mode, flexible, tmp_path):
    stock = train(tmp_path / 'stock', flexible)
    runner = train(
        tmp_path / 'hook', flexible, default_hooks=TUNE,
        **{KEY: dict(modules=['head'], mode=mode)})
    assert losses(runner) == losses(stock)
    log = logged(runner)
    assert log.count(f'nothing to put into {mode} mode') == 1
    assert 'no normalization. The model runs as stock' in log


@pytest.mark.parametrize('flexible', [False, True])
def test_an_empty_list_turns_nothing_on(flexible, tmp_path):
    """As in MMEngine."""
    runner = train(tmp_path, flexible, default_hooks=TUNE, **{KEY: []})
    assert latest_runs(runner.model) == {} and losses(runner)
    assert runner.cfg[KEY] == []
    assert 'names no modules: no mode is turned on' in logged(runner)


def test_the_table_is_logged_once(tmp_path):
    runner = build_runner(
        tmp_path, default_hooks=TUNE, validate=True,
        test_dataloader=toy.loader(), test_cfg=dict(),
        test_evaluator=dict(type='ToyAccuracy'))
    runner.train()
    runner.test()
    log = logged(runner)
    assert log.count('backbone.0  backbone.1  Tune') == 1
    assert log.count('Tune mode in the whole model: ') == 2


def test_unknown_argument_of_the_hook(tmp_path):
    with pytest.raises(TypeError, match='module'):
        build_runner(
            tmp_path,
            default_hooks=dict(
                tune_mode=dict(type='mmtune.TuneModeHook', module='neck')))


def test_log_says_what_was_fused(tmp_path):
    runner = train(tmp_path, default_hooks=TUNE)
    log = logged(runner)
    assert 'backbone.0  backbone.1  Tune' in log
    assert log.count('Blocks in the first iteration: 2 fused, 1 train') == 1
    assert log.count('1 of 3 blocks ran as stock since their BatchNorm') == 1
    assert "the first is 'neck.1'" in log and 'norm_eval=True' in log


def test_log_says_whether_there_is_a_native_node(tmp_path):
    log = logged(train(tmp_path, default_hooks=TUNE))
    assert f'native node: {native_status()}' in log


def test_log_does_not_warn_without_need(tmp_path):
    runner = train(tmp_path, default_hooks=TUNE, **{KEY: ['backbone']})
    log = logged(runner)
    assert 'ran as stock' not in log
    # Nor of what `norm_eval` of the backbone has not held yet.
    assert '2 blocks in Tune mode' in log and 'train mode' not in log


# The activation's output, in bytes, for the toy's batch of two.
MAP = 4 * 2 * 8 * 6 * 6


@pytest.mark.parametrize('key, arguments, is_on', [
    (None, {}, True),
    (dict(activations=False), {}, False),
    (dict(activations=False), dict(activations=True), True),
    (dict(activations=True), dict(activations=False), False),
    (dict(mode='Eval'), {}, False),
])
def test_activations_by_key_and_argument(key, arguments, is_on, tmp_path,
                                         monkeypatch):
    monkeypatch.setattr(tune_mode_hook, 'MIB', 1)
    runner = train(
        tmp_path,
        model=dict(type='ToyClassifier', act='SiLU'),
        default_hooks=dict(
            tune_mode=dict(type='mmtune.TuneModeHook', **arguments)),
        **({} if key is None else {KEY: key}))
    ran = {'backbone.2': 'one map'} if is_on else {}
    assert activation_runs(runner.model) == ran
    said = ('Activations in the first iteration: 1 one map; they spare '
            f'{MAP:.1f} MiB')
    assert logged(runner).count(said) == is_on


@pytest.mark.parametrize('act, level', [('SiLU', 'INFO'),
                                        ('ReLU', 'WARNING')])
def test_norms_that_train_are_no_mistake_where_activations_gain(
        act, level, tmp_path):
    runner = train(
        tmp_path,
        model=dict(type='ToyClassifier', act=act, norm_eval=False),
        default_hooks=TUNE)
    line, = (line for line in logged(runner).splitlines()
             if '3 of 3 blocks ran as stock since their BatchNorm' in line)
    assert f' - {level} - ' in line


@HOOKS.register_module()
class ReplaceNormsHook(Hook):
    """Puts other BatchNorms in the place of those of the backbone."""

    def before_train(self, runner):
        backbone = runner.model.backbone
        for name, module in backbone.named_children():
            if isinstance(module, nn.BatchNorm2d):
                new = nn.BatchNorm2d(module.num_features)
                new.load_state_dict(module.state_dict())
                setattr(backbone, name, new.to(module.weight))


@pytest.mark.filterwarnings('ignore:.*replaced after mmtune.turn_on')
def test_log_says_what_another_hook_replaced(tmp_path):
    runner = train(
        tmp_path,
        default_hooks=TUNE,
        custom_hooks=[dict(type='RecordHook'),
                      dict(type='ReplaceNormsHook')])
    log = logged(runner)
    assert log.count('2 replaced') == 1
    assert log.count('2 of 3 blocks ran as stock since a layer of') == 1
    assert "the first is 'backbone.1'" in log


# FlexibleRunner loads before EMAHook has a model to load into: stock fails.
@pytest.mark.parametrize('flexible, ema', [(False, False), (False, True),
                                           (True, False)])
def test_resume_continues_exactly(flexible, ema, tmp_path):
    hooks = [dict(type='RecordHook')]
    if ema:
        hooks.append(dict(type='EMAHook'))
    whole = train(
        tmp_path / 'whole',
        flexible,
        default_hooks=TUNE,
        custom_hooks=hooks,
        train_cfg=dict(by_epoch=True, max_epochs=3))
    train(
        tmp_path / 'parts',
        flexible,
        default_hooks=TUNE,
        custom_hooks=hooks,
        train_cfg=dict(by_epoch=True, max_epochs=2))
    resumed = train(
        tmp_path / 'parts',
        flexible,
        default_hooks=TUNE,
        custom_hooks=hooks,
        train_cfg=dict(by_epoch=True, max_epochs=3),
        resume=True)
    assert losses(resumed) == losses(whole)[-4:]
    for one, other in zip(whole.model.state_dict().values(),
                          resumed.model.state_dict().values()):
        assert torch.equal(one, other)


@pytest.mark.parametrize('written, read', [({}, TUNE), (TUNE, {})])
def test_checkpoints_are_exchanged_with_stock(written, read, tmp_path):
    train(tmp_path / 'a', default_hooks=written)
    path = str(tmp_path / 'a' / 'epoch_2.pth')
    state = CheckpointLoader.load_checkpoint(path)['state_dict']
    toy.ToyClassifier().load_state_dict(state, strict=True)
    ends = [
        train(
            tmp_path / name,
            default_hooks=hooks,
            load_from=path,
            custom_hooks=[dict(type='RecordHook')])
        for name, hooks in (('b', read), ('c', written))
    ]
    assert_same_run(*ends)


def test_validation_and_test_alone(tmp_path):
    train(tmp_path / 'a')
    checkpoint = str(tmp_path / 'a' / 'epoch_2.pth')
    metrics = []
    for name, hooks in (('stock', {}), ('tuned', TUNE)):
        runner = build_runner(
            tmp_path / name,
            validate=True,
            load_from=checkpoint,
            default_hooks=hooks,
            test_dataloader=toy.loader(),
            test_cfg=dict(),
            test_evaluator=dict(type='ToyAccuracy'))
        metrics.append((runner.val(), runner.test()))
    assert metrics[0] == metrics[1]
    assert set(latest_runs(runner.model).values()) == {'fused'}


def test_deploy_folds_what_was_loaded(tmp_path):
    train(tmp_path / 'a')
    checkpoint = str(tmp_path / 'a' / 'epoch_2.pth')
    options = dict(load_from=checkpoint, **{KEY: ['backbone']})
    tuned, deployed = (
        train(
            tmp_path / mode,
            default_hooks=dict(
                tune_mode=dict(type='mmtune.TuneModeHook', mode=mode)),
            **options) for mode in ('Tune', 'Deploy'))
    assert isinstance(deployed.model.backbone[1], FoldedNorm)
    # The same function at first, another path from there.
    torch.testing.assert_close(losses(tuned)[0], losses(deployed)[0])
    assert losses(tuned)[-1] != pytest.approx(losses(deployed)[-1], rel=1e-5)
    trained = deployed.optim_wrapper.param_groups[0]['params']
    assert any(deployed.model.backbone[0].bias is p for p in trained)


@pytest.mark.parametrize('options, message', [
    (dict(resume=True), "'Deploy' cannot resume"),
    (dict(custom_hooks=[dict(type='EMAHook')]), 'an EMAHook cannot follow'),
])
def test_deploy_refuses_what_it_cannot_do(options, message, tmp_path):
    runner = build_runner(
        tmp_path,
        default_hooks=dict(
            tune_mode=dict(type='mmtune.TuneModeHook', mode='Deploy')),
        **options)
    with pytest.raises(ValueError, match=message):
        runner.train()


def test_a_mistake_leaves_the_key_as_it_was(tmp_path):
    runner = build_runner(tmp_path, default_hooks=TUNE, **{KEY: 'bakbone'})
    for _ in range(2):
        with pytest.raises(ValueError, match='bakbone'):
            runner.train()
    assert runner.cfg[KEY] == 'bakbone'


def test_two_hooks_are_one_too_many(tmp_path):
    runner = build_runner(
        tmp_path,
        default_hooks=TUNE,
        custom_hooks=[
            dict(type='RecordHook'),
            dict(type='mmtune.TuneModeHook', modules='neck')
        ])
    with pytest.raises(ValueError, match='one TuneModeHook, but got 2'):
        runner.train()


DEPLOY = dict(tune_mode=dict(type='mmtune.TuneModeHook', mode='Deploy'))


def test_deploy_in_several_loops_of_a_runner(tmp_path):
    runner = train(tmp_path, validate=True, default_hooks=DEPLOY)
    assert runner.val() == runner.val()


def test_deploy_checkpoint_is_loaded_folded(tmp_path):
    trained = train(tmp_path / 'a', validate=True, default_hooks=DEPLOY)
    path = str(tmp_path / 'a' / 'epoch_2.pth')
    runner = build_runner(
        tmp_path / 'b', validate=True, default_hooks=DEPLOY, load_from=path)
    assert runner.val() == trained.val()
    for one, other in zip(trained.model.state_dict().values(),
                          runner.model.state_dict().values()):
        assert torch.equal(one, other)
    runner = build_runner(
        tmp_path / 'c', validate=True, default_hooks=TUNE, load_from=path)
    with pytest.raises(ValueError, match="written in mode 'Deploy'"):
        runner.val()


class NormModesHook(Hook):
    """Notes after each iteration which BNs of the backbone are held."""

    def __init__(self):
        self.training, self.runs = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        self.training.append(runner.model.backbone[1].training)
        self.runs.append(latest_runs(runner.model)['backbone.1'])


@pytest.mark.parametrize('begin', [0, 1, 2])
def test_begin_holds_bns_from_an_epoch_on(begin, tmp_path):
    def run(name, **options):
        runner = toy.build_runner(
            tmp_path / name,
            model=dict(type='ToyClassifier', norm_eval=False), **options)
        modes = NormModesHook()
        if options:
            runner.register_hook(modes)
        runner.train()
        return runner, modes

    runner, modes = run(
        'tune',
        default_hooks=toy.TUNE,
        efficient_conv_bn_eval=dict(modules=['backbone'], begin=begin))
    iterations = 4
    before = iterations * begin
    assert modes.training == ([True] * before + [False] * 8)[:8]
    assert modes.runs == (['train mode'] * before + ['fused'] * 8)[:8]
    stock, _ = run('stock')
    np.testing.assert_allclose(
        toy.losses(runner)[:before], toy.losses(stock)[:before], rtol=1e-6)
    assert 'ran as stock since' not in toy.logged(runner)


@pytest.mark.parametrize('options, message', [
    (dict(begin=-1), '`begin` must be an epoch'),
    (dict(begin='1'), '`begin` must be an epoch'),
    (dict(begin=1, norm_eval=True), 'holds BatchNorms by itself'),
    (dict(begin=1, mode='Deploy'), "goes with mode 'Tune'"),
])
def test_mistakes_about_begin(options, message, tmp_path):
    runner = toy.build_runner(
        tmp_path, default_hooks=toy.TUNE, efficient_conv_bn_eval=options)
    with pytest.raises(ValueError, match=message):
        runner.train()


def test_begin_asks_for_epochs(tmp_path):
    runner = toy.build_runner(
        tmp_path,
        default_hooks=toy.TUNE,
        efficient_conv_bn_eval=dict(begin=1),
        train_cfg=dict(by_epoch=False, max_iters=4))
    with pytest.raises(ValueError, match='IterBasedTrainLoop'):
        runner.train()


@MODELS.register_module()
class ToyTTAModel(BaseTTAModel):
    """As MMDetection's DetTTAModel, which `--tta` puts around a model."""

    def test_step(self, data):
        return self.module.test_step(data)

    def merge_preds(self, data_samples_list):
        return data_samples_list


def distributed(model, cls=nn.parallel.DistributedDataParallel):
    """Without the process group that its constructor asks for."""
    wrapper = cls.__new__(cls)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def with_test_step(model):
    """BaseTTAModel asks for one."""
    vars(model).setdefault('test_step', None)
    return model


WRAPPERS = {
    'TTA': lambda model: ToyTTAModel(with_test_step(model)),
    'DataParallel': lambda model: nn.DataParallel(model, device_ids=[]),
    'DDP': distributed,
    'MMDDP': lambda model: distributed(model, MMDistributedDataParallel),
    'compiled': torch.compile,
}
ORDERS = [(), *[(name, ) for name in WRAPPERS],
          *itertools.permutations(WRAPPERS, 2),
          ('TTA', 'compiled', 'DDP'), ('DDP', 'compiled', 'TTA'),
          ('compiled', 'TTA', 'MMDDP', 'compiled')]


@pytest.mark.parametrize('order', ORDERS, ids=' of '.join)
def test_names_are_those_of_the_model_however_wrapped(order):
    model = wrapped = toy.conv_bns()
    for name in reversed(order):
        wrapped = WRAPPERS[name](wrapped)
    assert _unwrapped(wrapped) is model


@pytest.mark.parametrize('options, turned_on', [
    ({KEY: ['backbone']}, ['backbone.1', 'backbone.4']),
    ({KEY: dict(modules='backbone', mode='Eval')}, []),
    ({KEY: dict(modules='backbone', mode='Deploy')}, []),
    ({}, ['backbone.1', 'backbone.4', 'neck.1']),
], ids=['Tune', 'Eval', 'Deploy', 'whole model'])
def test_test_time_augmentation(options, turned_on, tmp_path):
    """`--tta` makes the model of the config a part of another one."""
    accuracies = []
    for name, hooks in (('stock', {}), ('tuned', TUNE)):
        runner = build_runner(
            tmp_path / name,
            default_hooks=hooks,
            model=dict(type='ToyTTAModel', module=dict(type='ToyClassifier')),
            test_dataloader=toy.loader(),
            test_cfg=dict(),
            test_evaluator=dict(type='ToyAccuracy'),
            **options)
        accuracies.append(runner.test())
    assert accuracies[0] == accuracies[1]
    runs = latest_runs(runner.model.module)
    assert runs == dict.fromkeys(turned_on, 'fused')
