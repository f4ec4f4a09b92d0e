"""The ID-based CTR baselines of §4.1.3 and Appendix C.1: features, batches, models, and how they are fitted."""
