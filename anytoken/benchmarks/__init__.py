"""`anytoken bench`: our code and a named peer's in one run."""
