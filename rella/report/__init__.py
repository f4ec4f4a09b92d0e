"""Tables from artifacts; nothing here computes a result."""
