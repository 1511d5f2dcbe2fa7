"""Training data: records, views, tokenizing them once into shards, mixture and packing."""
