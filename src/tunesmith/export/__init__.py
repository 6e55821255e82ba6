"""What leaves the run: the model card and the upload to a hub."""
