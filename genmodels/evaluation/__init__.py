"""Evaluation: scores of images and of models, read from many sources, in one report."""
