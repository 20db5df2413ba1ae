PYTHON ?= python3

.PHONY: build
build:
	$(PYTHON) build_backend/native.py
