"""Inputs that may spill registers outside inner loops, and how many: docs/decisions/0010-spills.md.

Kernel, capability, inputs; the larger number of the two versions of Triton. All others: none.
"""

ALLOWED = {
    ("block_attention_bwd_dkv_kernel", 80, "fp32 D 128, TF32"): 1,
    ("block_attention_bwd_dkv_kernel", 100, "bf16 D 96, loaded"): 7,
    ("block_attention_fwd_kernel", 100, "bf16 D 128, partial blocks"): 6,
    ("landmark_attention_bwd_dkv_kernel", 80, "fp32 D 72"): 1,
}
