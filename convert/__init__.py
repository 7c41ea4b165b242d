"""Weights between Hugging Face checkpoints and this model: tables of rows and their walkers."""
