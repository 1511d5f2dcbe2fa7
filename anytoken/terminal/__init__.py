"""What the commands do at a terminal: read prompt parts, show and keep replies, show images, and talk."""
