"""Exports: an output as one file, or one dataset, that other programs load."""
