"""Ways to start work: the `cola` command and what it launches."""
