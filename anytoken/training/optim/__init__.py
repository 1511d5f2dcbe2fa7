"""What is trained, at which rate, by which optimizer."""
