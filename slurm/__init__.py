"""Templates, example sites and the supervisor of Slurm jobs: files, read by `launchers.slurm`."""
