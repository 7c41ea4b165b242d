"""From a batch to an updated, saved state, on one process or on many."""
