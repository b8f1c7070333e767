"""The parts of `tools.setup_environment`. Standard library only: they run before anything is installed."""
