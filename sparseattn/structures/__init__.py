"""Frozen values that say what is computed: index lists and masks."""
