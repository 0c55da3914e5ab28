"""A Vision Transformer beside a ResNet: what each costs, how fast it is here, and whether it is right."""


class UsageError(Exception):
    """Something the person at the command line can put right; the message is one line that says what."""
