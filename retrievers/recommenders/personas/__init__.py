"""A recommender that represents a user by several interest vectors."""
