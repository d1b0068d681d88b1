"""The command `sparseattn`: one file per subcommand, joined in `main.py`."""
