"""Softmax attention over a block mask; serves block_sparse_attention."""
