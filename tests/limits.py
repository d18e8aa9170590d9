"""Time limits. No test depends on speed: every wait ends with an event, and its limit is reached only by a hang."""

HANG_SECONDS = 600  # far more than any wait takes, even on a heavily loaded machine
HANG_MINUTES = HANG_SECONDS / 60
SECONDS_AFTER_A_FAILURE = 60  # for the other ranks to end by themselves
