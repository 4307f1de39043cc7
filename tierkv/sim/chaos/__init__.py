"""Deterministic fault simulation: a seed decides what comes, what fails, and when."""
