"""Convolution on active sites: a gather and a matrix product for each tap, no atomics."""
