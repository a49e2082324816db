"""A chat in the terminal with a running engine, over IPC: `python -m frontend.chat`.

A program of its own on top of the Python client; the server knows nothing of it.
"""
