"""Mixture of experts: router, dispatcher and experts, siblings that do not know each other."""
