"""Average pooling of active patches: as bench_sparse_max_pool3d, with means for maxima."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch.nn.functional import avg_pool3d

from sparseattn import sparse_avg_pool3d
from sparseattn.benchmarks import bench_sparse_max_pool3d as pools

BENCHMARK = replace(
    pools.BENCHMARK,
    op="sparse_avg_pool3d",
    build=partial(
        pools.build, sparse=sparse_avg_pool3d, dense=avg_pool3d,
        reduce=lambda windows: windows.mean(1),
    ),
)  # fmt: skip
