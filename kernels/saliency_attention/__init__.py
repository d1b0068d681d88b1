"""Compaction of kept tokens; serves saliency_attention."""
