"""What a config's key and a hook's arguments come to."""
import pytest

from mmtune.engine.options import merge_options

MODULES = dict(modules=['backbone'])


@pytest.mark.parametrize('key, arguments, expected', [
    (None, {}, dict(mode='Tune')),
    ('backbone', {}, dict(modules='backbone', mode='Tune')),
    (['backbone'], {}, dict(MODULES, mode='Tune')),
    (('backbone', ), {}, dict(modules=('backbone', ), mode='Tune')),
    (dict(MODULES, mode='Deploy'), {}, dict(MODULES, mode='Deploy')),
    (dict(mode=None), {}, dict(mode='Tune')),
    (['backbone'], dict(modules=None, begin=3),
     dict(MODULES, mode='Tune', begin=3)),
    (dict(activations=False), dict(activations=None),
     dict(mode='Tune', activations=False)),
    (dict(activations=False), dict(activations=True),
     dict(mode='Tune', activations=True)),
    (dict(modules='neck', norm_eval=True), dict(MODULES, norm_eval=False),
     dict(MODULES, mode='Tune', norm_eval=False)),
])
def test_merge_options(key, arguments, expected):
    before = key.copy() if isinstance(key, dict) else key
    assert merge_options(key, arguments) == expected
    assert key == before


@pytest.mark.parametrize('key, arguments, message', [
    (True, {}, 'a name, a list of names or a dict, but got True'),
    (dict(module='a'), {}, 'takes modules, mode, norm_eval, activations, '
     'begin, but got module'),
    (dict(mode=1), {}, '`mode` must be a name, but got 1'),
    (None, dict(mode=True), '`mode` must be a name, but got True'),
])
def test_mistakes(key, arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_options(key, arguments)
