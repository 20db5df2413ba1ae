"""Other methods against their published code, from clones, on a CPU."""
