"""Serving: the model behind HTTP, in the terms of OpenAI's API. Needs the extra `serve`."""
