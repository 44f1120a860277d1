"""Datasets to matplotlib figures."""
