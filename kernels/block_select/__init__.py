"""Index lists of block masks."""
