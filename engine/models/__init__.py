"""Embedding models: the provider interface, kept compatible with Kura's, and the providers behind it."""
