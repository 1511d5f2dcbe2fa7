"""`anytoken bench`: our code against a named peer in one run."""
