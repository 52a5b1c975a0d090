"""The mathematics, on tensors; nothing here knows a module's class."""
