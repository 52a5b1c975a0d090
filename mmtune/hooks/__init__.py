"""Hooks for MMEngine's runners."""
from mmtune.hooks.tune_mode_hook import TuneModeHook

__all__ = ['TuneModeHook']
