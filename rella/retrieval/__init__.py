"""Exact top-K retrieval of behaviours (SUBR, §3.2)."""
