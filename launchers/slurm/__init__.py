"""From a config and a site file to jobs of Slurm, and back from its queue and the run folders to what they do."""
