"""Experiments, one file each: `get_config()`, or `get_config(argument)`, returns a RunConfig or a ConfigDict of one."""
