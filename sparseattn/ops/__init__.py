"""Functional ops on tensors, one file an op."""
