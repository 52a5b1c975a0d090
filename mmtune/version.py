"""The version, kept apart so that setup.py reads it without torch."""

__version__ = '0.2.0'
