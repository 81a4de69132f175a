"""What a GPU does with this package: ceilings, correctness, times, memory and the commands, in one run."""
