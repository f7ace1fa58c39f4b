"""Worlds: generated tasks with known answers."""
