"""Settings of Sphinx for the documentation site, see ``make docs``.

The source folder is that of the repository, so that links between pages are
the same on the site and in the files, and hold from either.
"""
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

project = 'mmtune'
author = 'mmtune contributors'
project_copyright = author
release = version = runpy.run_path(str(ROOT / 'mmtune' /
                                       'version.py'))['__version__']

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
]
root_doc = 'docs/en/index'
include_patterns = [
    'docs/en/**.md', 'configs/**README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'
]
# Large folders that hold no pages.
exclude_patterns = ['.*', 'build', 'checkpoints', 'data', 'docs/_build',
                    'mmtune', 'tests', 'tools', 'work_dirs']
myst_heading_anchors = 3

# Docstrings say the types.
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute is no page of its own

html_theme = 'furo'
html_title = f'mmtune {release}'
html_static_path = ['_static']
html_extra_path = ['_extra']
html_css_files = ['site.css']
html_copy_source = False
html_theme_options = {
    'light_css_variables': {'color-brand-primary': '#3568a8',
                            'color-brand-content': '#3568a8'},
    'dark_css_variables': {'color-brand-primary': '#7fb0ee',
                           'color-brand-content': '#7fb0ee'},
}
