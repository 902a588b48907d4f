"""Buckets: places in object stores, connected to with what the environment says, and what their errors mean."""
