"""The LM-based baselines of Appendix C.2: CTR-BERT, PTab and P5. One process or one rank of several, no Ray."""
