"""Text: sources, documents, blocks of tokens, and what must hold of them."""
