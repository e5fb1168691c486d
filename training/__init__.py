"""What the training loop is made of. May import common, model and corpus."""
