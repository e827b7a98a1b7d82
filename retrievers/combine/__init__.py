"""Retrievers made of other retrievers."""
