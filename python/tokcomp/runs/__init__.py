"""What the search of schedules and the training of compressed models share: data, recipe, log, checkpoints, processes.

Everything random in a step depends only on (seed, step), so weights, optimizer state and step number are all that a run
needs to continue exactly as if it had not been stopped.
"""
