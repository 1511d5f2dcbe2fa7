"""The commands of `anytoken`, a file for each room they call into; `cli.py` puts them together."""
