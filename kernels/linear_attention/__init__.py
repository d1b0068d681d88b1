"""Linear attention with a fixed feature map; serves linear_attention."""
