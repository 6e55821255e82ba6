"""What leaves the run: the merged model, the model card and the upload to a hub."""
