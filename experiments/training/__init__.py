"""The training loop: tasks, optimizer, checkpoints, metrics."""
