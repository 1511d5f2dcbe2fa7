"""Common utilities: atomic file writing, JSON lines, devices, processes, error classes."""
