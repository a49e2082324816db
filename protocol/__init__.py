"""What the processes agree on: messages, sampling parameters, configuration, transport. Imports none of them."""

__version__ = "0.1.0"
