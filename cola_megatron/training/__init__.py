"""Training: batches, engine, schedule, checkpoints, measurements and the loop that ties them."""
