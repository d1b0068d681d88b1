"""Inputs that may spill registers outside inner loops, and how many: docs/decisions/0010-spills.md.

Kernel, capability, inputs; the larger number of the two versions of Triton. All others: none.
"""

ALLOWED = {
    ("block_attention_bwd_dkv_kernel", 80, "fp32 D 128, TF32"): 1,
    ("block_attention_bwd_dkv_kernel", 100, "bf16 D 96"): 2,
    ("block_attention_bwd_dq_kernel", 80, "fp32 D 160"): 2,
    ("block_attention_bwd_dq_kernel", 80, "fp32 D 192"): 2,
    ("block_attention_bwd_dq_kernel", 80, "fp32 D 96, loaded"): 2,
    ("block_attention_bwd_dq_kernel", 90, "fp32 D 160"): 2,
    ("block_attention_bwd_dq_kernel", 100, "bf16 D 64, partial blocks"): 2,
    ("block_attention_fwd_kernel", 80, "fp32 D 128, partial blocks"): 2,
    ("block_attention_fwd_kernel", 100, "bf16 D 128, partial blocks"): 3,
    ("block_attention_fwd_kernel", 100, "fp32 D 72"): 2,
    ("landmark_attention_bwd_dkv_kernel", 80, "fp32 D 72"): 1,
    ("landmark_attention_bwd_dkv_kernel", 90, "fp32 D 64, one tile"): 8,
    ("landmark_attention_bwd_dkv_kernel", 90, "fp32 D 64, other stage"): 8,
    ("landmark_attention_bwd_dkv_kernel", 90, "fp32 D 64, relu"): 2,
    ("landmark_attention_bwd_dkv_kernel", 90, "fp32 D 72"): 4,
    ("landmark_attention_bwd_dq_kernel", 80, "bf16 D 40"): 1,
    ("landmark_attention_bwd_dq_kernel", 100, "fp32 D 72"): 1,
}
