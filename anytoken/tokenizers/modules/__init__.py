"""Parts that tokenizers are built from: ConvNeXt stacks, quantizers, the search for codes."""
