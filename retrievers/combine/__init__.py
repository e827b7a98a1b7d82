"""Retrievers that ask other retrievers."""
