"""What the papers show, shown again on handwritten digits at a scale that two CPU cores manage."""
