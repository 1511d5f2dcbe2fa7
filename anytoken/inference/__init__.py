"""From a prompt to a reply: the generation loop, sampling, events, conversations, and the public API."""
