"""Hooks for MMEngine's runners."""
from mmtune.hooks.step_memory_hook import StepMemoryHook
from mmtune.hooks.tune_mode_hook import TuneModeHook

__all__ = ['StepMemoryHook', 'TuneModeHook']
