import builtins
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub

from mmtune.engine.checkpoint import allow_mmengine_checkpoints

allow_mmengine_checkpoints()


class Reduced:
    """Pickles as whatever a forger likes."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def reloaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('value', [
    np.arange(6.).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array([True, False]),
    np.zeros((0, 3), np.float32),
    np.array(2.5),
    np.arange(3, dtype='>f8'),
    np.float64(0.1),
    np.int64(7),
    np.bool_(True),
])
def test_numbers_come_back(value):
    other = reloaded(value)
    np.testing.assert_array_equal(other, value)
    # numpy unpickles into the byte order of the machine.
    assert np.asarray(other).dtype == np.asarray(value).dtype.newbyteorder('=')
    assert pickle.loads(pickle.dumps(other)).__class__.__module__ == 'numpy'


def test_message_hub_comes_back():
    hub = MessageHub.get_instance('before')
    for value in (1., 2., 4.):
        hub.update_scalar('loss', value)
    hub.update_info('iter', 3)
    state = reloaded(hub.state_dict())
    other = MessageHub.get_instance('after')
    other.load_state_dict(state)
    buffer = other.get_scalar('loss')
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.mean() == pytest.approx(7 / 3) and buffer.current() == 4
    buffer.update(5.)
    assert buffer.max() == 5 and other.get_info('iter') == 3
    # A checkpoint written after a resume needs mmtune no more than others.
    assert b'mmtune' not in pickle.dumps(other.state_dict())
    copy.deepcopy(other.state_dict())


DTYPE = Reduced(np.dtype, ('f8', False, True))


def array(dtype, shape, data, kind=np.ndarray):
    rebuild = np.zeros(1).__reduce__()[0]
    return Reduced(rebuild, (kind, (0, ), b'b'), (1, shape, dtype, False,
                                                  data))


FORGED = {
    'object array': np.array([object], dtype=object),
    'object dtype': Reduced(np.dtype, ('O', False, True)),
    'a dtype with fields': array(
        Reduced(
            np.dtype, ('V8', False, True),
            (3, '|', None, ('a', ), dict(a=(np.dtype('f8'), 0)), 8, 1, 16)),
        (1, ), b'A' * 8),
    'too few bytes': array(DTYPE, (2, ), b'A' * 8),
    'too many bytes': array(DTYPE, (1, ), b'A' * 16),
    'a list for bytes': array(DTYPE, (1, ), [object]),
    'negative shape': array(DTYPE, (-1, ), b''),
    'structured scalar': Reduced(
        np.float64(0).__reduce__()[0], (DTYPE, b'A' * 4)),
    'another getattr': Reduced(getattr, (HistoryBuffer, '__init__')),
    'getattr of another': Reduced(getattr, (np.ndarray, 'dump')),
    'eval': Reduced(builtins.eval, ('1', )),
}


@pytest.mark.parametrize('value', FORGED.values(), ids=FORGED)
def test_anything_else_is_refused(value):
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        reloaded(value)


def test_forged_fields_do_not_reach_numpy():
    """Fields of objects over raw bytes would be pointers from the file."""
    state = (3, '<', None, ('a', ), dict(a=(Reduced(np.dtype, ('f8', )), 0)),
             8, 1, 1)
    forged = array(Reduced(np.dtype, ('f8', False, True), state), (1, ),
                   b'A' * 8)
    assert reloaded(forged).dtype == np.float64
