"""The paper's tables and figures: its numbers, and what has to be run to get ours."""
