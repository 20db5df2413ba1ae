"""ToCom's claims at a small scale: one half of the digits to pre-train on, the other half as the task."""
