"""What Atoll is measured against, each called as its own users call it."""
