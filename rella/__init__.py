"""ReLLa on Ray: retrieval-enhanced large language models for recommendation (WWW '24), as a suite of Ray jobs."""

__version__ = "0.1.0"
