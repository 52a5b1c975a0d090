"""Finds the pairs of convolution and normalization of a model."""
