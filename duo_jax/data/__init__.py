"""From text to batches: tokenizers, sources, preparation of token shards, and the grain pipeline."""
