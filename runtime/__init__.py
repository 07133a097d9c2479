"""Floor 2: turns a checkpoint and a prompt into tokens. Calls kernels by op name only."""
