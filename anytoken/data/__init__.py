"""Training data: building the sets, tokenizing them once, views, mixture and packing."""
