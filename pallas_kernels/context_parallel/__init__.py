"""Attention of a device that holds a part of the keys; for use inside of `jax.shard_map`."""
