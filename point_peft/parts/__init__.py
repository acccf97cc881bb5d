"""Building blocks of methods: parts at sites of the backbone, and what they are made of."""
