"""Attention of a device that holds a shard of the keys; for use inside of `jax.shard_map`."""
