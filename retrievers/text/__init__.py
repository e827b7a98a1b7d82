"""Backends that read a query's words."""
