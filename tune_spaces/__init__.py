"""What sweeps choose from: one module a method, each with METRIC, MODE and space()."""
