"""One recipe of training, on accelerate."""
