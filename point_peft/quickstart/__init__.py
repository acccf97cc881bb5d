"""The main job from data to adapter file as a program that comes with the package: `python -m point_peft.quickstart`.

It is one of the examples, written as its reader would: against the public names, with a loop of its own. `tour` is the
program; beside it stand its data, its loop of training, its picture, and its comparison with other methods. The library
does not import it, and it needs the extra `examples`.
"""
