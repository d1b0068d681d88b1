"""Numbers that more than one module needs."""

PAD_INDEX = -1  # fills the unused tail of an index list; never read as a block id

EMPTY_BLOCK = -1  # values of BlockMask.block_states(); a slot of token bits is >= 0
FULL_BLOCK = -2

BITS_PER_WORD = 32  # token bits of a partial block are packed into int32 words

MIN_BLOCK, MAX_BLOCK, BLOCK_STEP = 16, 256, 16

SITES_PER_LIST = (
    128  # columns of a KernelMap that share a list of taps; a tile of a kernel divides it
)
