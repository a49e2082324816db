"""Starts the processes of an engine, watches over them, replaces those that die, and stops them in order."""
