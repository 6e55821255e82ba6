"""Training: the run folder, the one call of trainer.train, checkpoints and callbacks."""
