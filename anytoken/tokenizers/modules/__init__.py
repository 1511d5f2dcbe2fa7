"""Building blocks of tokenizers: ConvNeXt stacks, quantizers, code search."""
