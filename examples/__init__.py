"""Runnable examples: pre-training on procedural solids, and the main job from data to adapter file."""
