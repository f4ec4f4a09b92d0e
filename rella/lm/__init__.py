"""The language model: loading, embedding, tuning, scoring. One process, no Ray."""
