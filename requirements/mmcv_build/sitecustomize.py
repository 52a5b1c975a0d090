"""Lets mmcv 2.1.0 compile on Python 3.13 and later.

Its setup.py runs mmcv/version.py with a bare `exec` inside a function and then
looks for `__version__` in `locals()`. Since PEP 667 that finds nothing there:
what `exec` defines must be written through to the frame.
"""
import builtins
import sys


def exec_in_frame(source, globals=None, locals=None, /, *, _exec=exec, **rest):
    """Do what `exec` does, defining names where the caller sees them."""
    if globals is None:
        frame = sys._getframe(1)
        globals, locals = frame.f_globals, frame.f_locals
    _exec(source, globals, locals, **rest)


if sys.version_info >= (3, 13):
    builtins.exec = exec_in_frame
