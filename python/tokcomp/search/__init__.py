"""The differentiable search of a compression schedule (DiffRate, ICCV 2023)."""
