"""Tasks as data: a YAML file defines records, prompts, decoding and metrics."""
