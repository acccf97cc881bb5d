"""An adapter as files."""
