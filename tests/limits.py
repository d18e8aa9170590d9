"""No test depends on speed: whatever waits goes on when something happens, and gives up only where it never would."""

HANG_SECONDS = 600  # far more than any wait takes on a machine that is loaded many times over
HANG_MINUTES = HANG_SECONDS / 60
SECONDS_AFTER_A_FAILURE = 60  # that the other ranks have to end by themselves
