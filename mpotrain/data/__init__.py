"""Raw text to token shards, and token shards to micro-batches."""
