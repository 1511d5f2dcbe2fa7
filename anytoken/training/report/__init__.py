"""Reports of a run: HTML page, Markdown, samples, the card of an adapter."""
