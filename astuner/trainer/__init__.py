"""The training loop over a Policy: batches, advantages, schedule, checkpoint and resume."""
