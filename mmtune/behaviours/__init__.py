"""What hangs on the modules of a model in Tune mode.

All of it hangs on instances (see :mod:`mmtune.utils.attach`), so that the
classes of a model stay what they were.
"""
