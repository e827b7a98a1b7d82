"""A table of PostgreSQL as a retriever: full text, embeddings by pgvector, or both fused in SQL."""
