"""Attachment of adapters to a backbone: the only package that touches foreign modules."""
