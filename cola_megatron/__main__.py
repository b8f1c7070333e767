"""`python -m cola_megatron` is the `cola` command, for a Python that the caller chose, as torchrun and Slurm do."""

from cola_megatron.command import main

if __name__ == "__main__":
    main()
