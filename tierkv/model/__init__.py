"""The model: transformers' own code, with tierkv's paged attention in its layers."""
