"""Triton kernels: ``triton/<op>.py`` holds one operator's kernels and launcher, imported only when it is needed."""
