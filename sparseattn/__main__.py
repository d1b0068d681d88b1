"""`python -m sparseattn`: the same as the command `sparseattn`."""

from sparseattn.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
