"""Pooling of active patches, and active patches written into a dense volume; no atomics."""
