"""A queue under a load that rises and falls, served at the degree of compression that its length calls for."""
