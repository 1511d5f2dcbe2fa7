"""What every room needs: files written whole, JSON lines, devices, processes, error classes."""
