"""A backbone as the library understands it; nothing in here runs a model."""
