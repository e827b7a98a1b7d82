"""A retriever behind HTTP: server and client."""
