"""Sparse attention kernels for vision models on large images and volumes.

Importing this package imports neither Triton nor a GPU driver; kernels load on first use.
"""

from sparseattn.convert import convert, revert
from sparseattn.explain import explain
from sparseattn.integrations.masked import convert_masked, revert_masked
from sparseattn.integrations.torch import patch_sdpa
from sparseattn.layers.performer import redraw_features
from sparseattn.layers.sparse_attention import SparseAttention
from sparseattn.ops.approximation_error import approximation_error
from sparseattn.ops.attention_factors import AttentionFactors
from sparseattn.ops.block_sparse_attention import block_sparse_attention
from sparseattn.ops.densify import densify
from sparseattn.ops.linear_attention import linear_attention
from sparseattn.ops.linformer_attention import linformer_attention
from sparseattn.ops.nystrom_attention import nystrom_attention
from sparseattn.ops.orthogonal_features import orthogonal_features
from sparseattn.ops.performer_attention import performer_attention
from sparseattn.ops.saliency_attention import saliency_attention
from sparseattn.ops.sparse_avg_pool3d import sparse_avg_pool3d
from sparseattn.ops.sparse_conv3d import sparse_conv3d
from sparseattn.ops.sparse_conv_transpose3d import sparse_conv_transpose3d
from sparseattn.ops.sparse_max_pool3d import sparse_max_pool3d
from sparseattn.ops.submanifold_conv3d import submanifold_conv3d
from sparseattn.ops.topk_attention import topk_attention
from sparseattn.structures.block_mask import BlockMask
from sparseattn.structures.kernel_map import KernelMap
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.patch_mask import PatchMask
from sparseattn.structures.tile_order import TileOrder
from sparseattn.structures.voxel_tensor import VoxelTensor

__version__ = "0.1.0"

__all__ = [
    "AttentionFactors",
    "BlockMask",
    "KernelMap",
    "PatchGrid",
    "PatchMask",
    "SparseAttention",
    "TileOrder",
    "VoxelTensor",
    "approximation_error",
    "block_sparse_attention",
    "convert",
    "convert_masked",
    "densify",
    "explain",
    "linear_attention",
    "linformer_attention",
    "nystrom_attention",
    "orthogonal_features",
    "patch_sdpa",
    "performer_attention",
    "redraw_features",
    "revert",
    "revert_masked",
    "saliency_attention",
    "sparse_avg_pool3d",
    "sparse_conv3d",
    "sparse_conv_transpose3d",
    "sparse_max_pool3d",
    "submanifold_conv3d",
    "topk_attention",
]
