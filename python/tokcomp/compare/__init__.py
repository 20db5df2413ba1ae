"""Every method at every budget, at equal cost, on the user's own model and images."""
