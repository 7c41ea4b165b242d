"""Folders and files as Hugging Face lays them out."""
