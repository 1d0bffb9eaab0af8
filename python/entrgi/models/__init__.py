"""Checkpoints: which files hold a model, what its config.json says, and how it gets onto a device."""
