"""How often healthy runs are called ill, and faults are found."""
