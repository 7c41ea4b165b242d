"""Folders that conversions write: checkpoints in parts, manifests, complete or visibly not."""
