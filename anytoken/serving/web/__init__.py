"""The web page: talk to a model, look at its tokens, watch a training run. Needs the extra `web`."""
