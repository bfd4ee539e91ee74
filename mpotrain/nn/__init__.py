"""Single-device layers; nothing here knows about processes."""
