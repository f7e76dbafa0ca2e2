"""CMLFA."""
