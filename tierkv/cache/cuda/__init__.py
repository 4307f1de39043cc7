"""Moves between a pool on a GPU and the tiers below it."""
