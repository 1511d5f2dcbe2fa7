"""Terminal input and output: read prompt parts, show and save replies, show images, chat."""
