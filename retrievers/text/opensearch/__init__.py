"""Searches on Elasticsearch and OpenSearch."""
