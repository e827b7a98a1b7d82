"""Several interest vectors a user."""
