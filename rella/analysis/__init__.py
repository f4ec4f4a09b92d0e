"""What tables and figures show beside metrics: heterogeneity of histories."""
