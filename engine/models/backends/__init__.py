"""Backends: how a local model runs a padded batch. None of them knows of texts, and none of Ray."""
