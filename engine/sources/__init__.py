"""Sources: list and fingerprint inputs, say how they can be cut, read the rows of a shard, check a text."""
