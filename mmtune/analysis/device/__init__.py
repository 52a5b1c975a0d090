"""Check Tune mode on a device, and measure what it costs there.

Needs torch, and torchvision for the detectors; nothing of OpenMMLab's::

    python -m mmtune.analysis.device --device cuda --json gpu.json > gpu.md
"""
