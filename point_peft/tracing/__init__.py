"""Understanding a backbone by running it."""
