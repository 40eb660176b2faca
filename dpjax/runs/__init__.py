"""Whole training runs: configuration, folder, execution, report."""
