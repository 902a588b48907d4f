"""The pipeline: shards in, receipts out. The only place that imports Ray."""
