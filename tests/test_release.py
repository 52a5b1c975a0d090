"""What goes with a release: change log, citation, workflows."""
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from mmengine.fileio import load

ROOT = Path(__file__).resolve().parents[1]
VERSION = runpy.run_path(str(ROOT / 'mmtune' / 'version.py'))['__version__']
# A workflow has the key `on`, which YAML 1.1 takes for a truth value.
WORKFLOWS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))
FORMS = sorted((ROOT / '.github' / 'ISSUE_TEMPLATE').glob('*_*.yml'))


def released():
    """Return version and date of each heading of the change log."""
    text = (ROOT / 'CHANGELOG.md').read_text()
    headings = re.findall(r'^## (.*)$', text, re.MULTILINE)
    return [re.fullmatch(r'([\d.]+) \((\d{4}-\d\d-\d\d)\)', heading).groups()
            for heading in headings]


def make_targets():
    text = (ROOT / 'Makefile').read_text()
    lines = re.findall(r'^\.PHONY: (.*)$', text, re.MULTILINE)
    return {target for line in lines for target in line.split()}


def test_change_log_begins_with_this_version():
    versions = released()
    assert versions[0][0] == VERSION
    assert versions == sorted(
        versions, key=lambda pair: pair[1], reverse=True)


def test_citation_is_of_this_version():
    citation = load(ROOT / 'CITATION.cff', file_format='yaml')
    assert citation['cff-version'] == '1.2.0'
    assert (citation['version'],
            str(citation['date-released'])) == released()[0]
    assert citation['type'] == 'software' and citation['message']
    paper = citation['preferred-citation']
    assert paper['url'] == 'https://arxiv.org/abs/2305.11624'
    for author in paper['authors']:
        assert author.keys() == {'family-names', 'given-names'}


def test_every_target_can_be_made():
    for target in make_targets():
        # Says what it would do, and does nothing.
        subprocess.run(['make', '-n', target], cwd=ROOT, check=True,
                       capture_output=True)


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_targets_of_make(path):
    for job in load(path)['jobs'].values():
        commands = [step['run'] for step in job['steps'] if 'run' in step]
        assert commands == ['make ${{ matrix.target }}']
        targets = job['strategy']['matrix']['target']
        assert set(targets) <= make_targets()
        assert {'lint', 'test', 'docs', 'wheel'} <= set(targets)


@pytest.mark.parametrize('path', FORMS, ids=lambda path: path.stem)
def test_issue_form_has_its_parts(path):
    form = load(path)
    assert form['name'] and form['description']
    names = [field['id'] for field in form['body']]
    assert len(names) == len(set(names))
    assert all(field['attributes']['label'] for field in form['body'])


def test_hooks_before_a_commit_run_what_make_lint_runs():
    config = load(ROOT / '.pre-commit-config.yaml')
    entries = {
        ' '.join(hook['entry'].split()[:2])
        for repo in config['repos'] for hook in repo['hooks']
    }
    recipe = (ROOT / 'Makefile').read_text()
    assert entries
    assert all(entry in recipe for entry in entries)
