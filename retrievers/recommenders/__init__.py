"""Backends that are fitted on histories."""
