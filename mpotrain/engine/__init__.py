"""Engines: the back ends that turn micro-batches into one optimizer step."""
