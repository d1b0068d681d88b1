"""Claims of the papers, measured on the machine at hand: what `sparseattn validate` runs."""
