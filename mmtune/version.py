"""The version, kept apart so that setup.py reads it without torch."""

__version__ = '0.1.0'
