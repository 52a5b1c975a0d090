"""What several pages start from."""
import pytest
import torch
from reproductions import material

from mmtune.behaviours.activation import activation_runs
from tests.oracle import runs
from tests.tools.synthetic import fill


@pytest.fixture
def place(tmp_path, monkeypatch):
    fill(tmp_path, monkeypatch)


def test_what_is_there_is_not_fetched(place, monkeypatch):
    monkeypatch.setattr(material, 'run_tool', None)
    assert material.fetch_weights() == 'checkpoints/mobilenet_v2_imagenet.pth'


def test_missing_weights_are_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(material, 'run_tool', lambda *call: calls.append(call))
    path = material.fetch_weights()
    assert calls == [
        ('model_converters/mobilenet_v2_to_mmdet.py', '--dst', path)
    ]


@pytest.mark.slow
def test_trees_are_left_as_they_are(place, capfd):
    material.fetch_trees()
    assert 'complete' in capfd.readouterr().out


def test_classifier_has_the_weights_and_is_always_the_same(place):
    one, other = (material.pretrained_classifier() for _ in range(2))
    weights = torch.load('checkpoints/mobilenet_v2_imagenet.pth')['state_dict']
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
        if key.startswith('backbone.'):
            assert torch.equal(value, weights[key.removeprefix('backbone.')])


def test_digits():
    images, labels = material.digits(32, 100)
    others, _ = material.digits(32, 100, 'test')
    assert images.shape == (100, 3, 32, 32) and labels.shape == (100, )
    assert sorted(set(labels.tolist())) == list(range(10))
    # A test that shares images with the training would say nothing.
    assert not any(torch.equal(a, b) for a in images for b in others)


@pytest.mark.parametrize('put', [material.put_in_paper_mode,
                                 material.put_in_folding_mode])
def test_activations_are_stock_as_in_the_paper(place, put):
    model = material.pretrained_classifier()
    put(model, 'Tune')
    assert runs(model) and activation_runs(model) == {}


@pytest.mark.small_maps
def test_small_maps_are_folded(place):
    model = material.pretrained_classifier()
    material.put_in_folding_mode(model, 'Tune')
    model(*material.digits(32, 2))
    assert set(runs(model)) == {'fused'}


def divmod_and_threads(one, other):
    return *divmod(one, other), torch.get_num_threads()


def test_in_processes_of_one_thread_each():
    found = material.in_processes(
        divmod_and_threads, [(7, 2), (9, 4)], 'Divide')
    assert found == [(3, 1, 1), (2, 1, 1)]


def test_what_fails_in_a_process_is_raised():
    with pytest.raises(ZeroDivisionError):
        material.in_processes(divmod, [(1, 1), (1, 0)] + 99 * [(1, 1)],
                              'Divide')
