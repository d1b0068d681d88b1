"""Training the reference models: one loop, checkpoints that resume, logs and pages.

`sparseattn.training.loop` has `train` and `resume`, `sparseattn.training.evaluate` has `evaluate`.
"""
