"""Serving: CUDA graphs of a model, and packages that need neither timm nor, in a C++ program, Python."""
