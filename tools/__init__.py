"""Makers of pages, figures and pre-trained files."""
