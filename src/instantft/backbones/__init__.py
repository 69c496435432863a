"""Backbones: the frozen networks that yield records."""
