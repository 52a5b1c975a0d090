"""Sweeps over the networks of other libraries, against stock.

``make sweep LIB=timm`` runs one. It is no part of ``make test``: a library is
installed into an environment of its own. What a sweep found stands in
``docs/en/sweeps.json``, and ``docs/render.py`` writes docs/en/sweeps.md of it.

- ``libraries/``: a module a library. It says what to install, which networks
  there are, how one is built, and what it takes.
- ``environment.py``: makes the environment of a library.
- ``oracle.py``: compares a network in Tune mode with stock.
- ``isolation.py``: runs that in a process of its own, with a time limit.
- ``__main__.py``: sweeps a library, and keeps what was found.
"""
