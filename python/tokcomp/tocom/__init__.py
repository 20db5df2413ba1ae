"""Moving a model between compression degrees without training it again (ToCom, ECCV 2024)."""
