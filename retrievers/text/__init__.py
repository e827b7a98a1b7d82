"""Backends that read the text of a query."""
