"""The torch path: gathered blocks in cache-sized chunks, for CPUs and as a fallback."""
