"""Commands on one saved model."""
