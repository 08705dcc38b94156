"""What a lab adds in a package of its own: a robot, a layout, a dataset format, an experiment."""
