"""Weights between Hugging Face folders and checkpoints of this model: the verbs and their parts."""
