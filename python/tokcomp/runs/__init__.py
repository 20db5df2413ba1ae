"""What the search of schedules and the training of compressed models share: data, recipe, log, checkpoints, processes.

Everything random in a step follows from (seed, step), so that weights, optimizer state and the number of the step are
all that a run needs to go on exactly as if it had not been stopped.
"""
