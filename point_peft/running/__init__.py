"""One forward pass of an adapted model: what is active in it and what it knows."""
