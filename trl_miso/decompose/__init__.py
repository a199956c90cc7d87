"""Instructions with their constraints in the text become a base instruction and a list of constraints."""
