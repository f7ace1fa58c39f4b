"""Agents that learn to search."""
