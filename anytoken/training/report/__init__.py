"""What a run says of itself: HTML page, Markdown, samples, the card of an adapter."""
