"""Meshes and the rules that map logical axes to mesh axes."""
