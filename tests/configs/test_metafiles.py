"""Every metafile and the index of them, in the form that MIM reads."""
from pathlib import Path

import pytest
from mmengine.fileio import load

ROOT = Path(__file__).parents[2]
INDEX = load(ROOT / 'model-index.yml')
METAFILES = sorted((ROOT / 'configs').glob('*/metafile.yml'))
NAMES = [path.parent.name for path in METAFILES]
# What each entry has to say, and may say.
COLLECTION = {'Name', 'Metadata', 'Paper', 'README'}
MODEL = {'Name', 'In Collection', 'Config', 'Metadata', 'Results'}
RESULT = {'Task', 'Dataset'}
METADATA = {
    'Batch Size': int,
    'Figures From': str,
    'Memory Saved (%)': float,
    'Not Run Here': bool,
    'Precision': str,
    'Seconds per Iteration': float,
    'Training Memory (GB)': float,
}


def test_index_is_a_list_of_all_metafiles():
    assert INDEX.keys() == {'Import'}
    assert sorted(INDEX['Import']) == [
        str(path.relative_to(ROOT)) for path in METAFILES
    ]


@pytest.mark.parametrize('path', METAFILES, ids=NAMES)
def test_metafile_is_complete(path):
    content = load(path)
    # Detectors of several folders share a collection.
    assert {'Models'} <= content.keys() <= {'Collections', 'Models'}
    for collection in content.get('Collections', []):
        assert collection.keys() == COLLECTION
        assert collection['Paper'].keys() == {'URL', 'Title'}
        assert collection['Paper']['URL'].startswith('https://arxiv.org/abs/')
        assert (ROOT / collection['README']).is_file()
    for model in content['Models']:
        assert model.keys() == MODEL, model['Name']
        for key, value in model['Metadata'].items():
            assert isinstance(value, METADATA[key]), (model['Name'], key)
        for result in model['Results']:
            assert RESULT <= result.keys() <= RESULT | {'Metrics'}
            for metric, value in result.get('Metrics', {}).items():
                assert isinstance(value, float), (model['Name'], metric)
                assert 0 < value < 100


def test_names_and_configs_are_listed_once():
    models = [model for path in METAFILES for model in load(path)['Models']]
    for key in ('Name', 'Config'):
        values = [model[key] for model in models]
        assert len(values) == len(set(values))
    assert all((ROOT / model['Config']).is_file() for model in models)
