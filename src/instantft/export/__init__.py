"""Adapted networks for other programs."""
