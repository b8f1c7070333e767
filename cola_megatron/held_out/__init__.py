"""What is measured on the held-out split, in training and on a checkpoint."""
