"""Readers of people's clouds, and their way into a model."""
