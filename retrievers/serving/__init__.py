"""The server and the client of a retriever over HTTP."""
