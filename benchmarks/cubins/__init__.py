"""Compiles every launch row of every kernel ahead of time and judges it; no GPU is needed."""
