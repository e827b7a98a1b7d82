"""The texts of prompts."""

from __future__ import annotations

PLACES = ("{query}", "{history}", "{history_line}", "{candidates}")

# Prompt templates by name. {answer} is replaced by a text of `WRITE`, which says how to write the completion.
PROMPTS = {
    "words": 'Name five things related to "{query}", on one line.',
    "sparse": (
        "You write queries for a keyword search engine (BM25 over product and document text). Rewrite the "
        "user's query so that the engine ranks what the user needs first: keep the terms that matter and add "
        "words that relevant documents are likely to contain.\n{answer}\n\nUser query: {query}"
    ),
    "dense": (
        "You write queries for a search engine that compares meanings (embeddings of queries and products). "
        "Rewrite the user's query as a short description of the product that would satisfy it: what it is, what "
        "it is for, and the properties that matter.\n{answer}\n\nUser query: {query}"
    ),
    "sequential": (
        "A customer bought these items, oldest first:\n{history}\n\nPredict what this customer buys next, and write "
        "a query for a product search engine that finds it: the kind of product, and words its title is likely to "
        "contain.\n{answer}"
    ),
    "items": (
        "A customer chose these items, oldest first:\n{history}\n\nRecommend ten items this customer is likely to "
        "choose next, by title, the likeliest first, none of those above.\n{answer}"
    ),
    "edit": (
        "A customer chose these items, oldest first:\n{history}\n\nA recommender learns from this list. Improve it: "
        "name titles of products it should take as wished for, and titles it should take as not wanted, so that it "
        "finds what this customer chooses next.\n{answer}"
    ),
    "structured": (
        "You write queries for a search engine. Rewrite the user's query so that the engine ranks what the user needs "
        "first: keep the words that matter, add words that relevant documents are likely to contain, and require only "
        "what is certain.\n{answer}\n\nUser query: {query}"
    ),
    "rerank": (
        "A customer searches for: {query}\n\nThese products were found:\n{candidates}\n\nOrder all of them by how well "
        "they satisfy the customer, the best first.\n{answer}"
    ),
}
WRITE = {
    "line": {
        "query": "Answer with the query alone, on one line.",
        "items": "Answer with one title a line and nothing else.",
        "ranking": "Answer with their numbers alone, separated by commas.",
        "edit": "Answer with two lines and nothing else:\nmore: title; title\nless: title; title",
    },
    "json": {
        "query": 'Answer with JSON, like this: <answer>{"query": "…"}</answer>',
        "items": 'Answer with JSON, like this: <answer>{"items": ["…", "…"]}</answer>',
        "ranking": 'Answer with JSON, like this: <answer>{"ranking": [3, 1, …]}</answer>',
        "edit": 'Answer with JSON, like this: <answer>{"more_like": ["…"], "less_like": ["…"]}</answer>',
    },
}
THINK = "Think first, between <think> and </think>. "
