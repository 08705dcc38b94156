"""Experiments, one file each: `get_config()`, or `get_config(argument)`, returns a config of `pi0.run_config`."""
