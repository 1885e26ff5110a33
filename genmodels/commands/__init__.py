"""The commands: train, sample and evaluate."""
