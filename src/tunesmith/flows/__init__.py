"""Dataflows for Hamilton's driver that stand beside the main one: modules of noun-named functions."""

from tunesmith.training.fit import quiet_libraries

quiet_libraries()  # before a flow loads the libraries, and Hamilton its extensions
