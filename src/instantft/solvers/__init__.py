"""Solvers: from a base network and labelled samples to an adapter."""
