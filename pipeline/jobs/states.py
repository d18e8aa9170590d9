"""The states of a run, what moves it from one to another, and whether its Slurm job is requeued."""

from enum import IntEnum, StrEnum
from typing import NamedTuple


class State(StrEnum):
    """The state in RUN/status.json."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"  # by a signal, after it wrote a checkpoint
    FINISHED = "finished"
    REFUSED = "refused"  # by preflight
    FAILED = "failed"


class Event(StrEnum):
    """What a program of the run reports, or how its job ended."""

    START = "start"
    RUNNING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"
    JOB_SUCCEEDED = "job succeeded"  # srun exited with 0
    JOB_INTERRUPTED = "job interrupted"  # with 130: Ctrl-C
    JOB_FAILED = "job failed"  # with any other status
    JOB_TERMINATED = "job terminated"  # by Slurm, which itself decides whether the job starts again


class Verdict(IntEnum):
    """What becomes of the job: the exit status of `python -m pipeline.jobs.requeue`."""

    DONE = 0
    FAIL = 1
    REQUEUE = 75  # EX_TEMPFAIL of sysexits.h


class Transition(NamedTuple):
    """verdict: None until the job has ended.  failure: the run's list of failures gets one more."""

    state: State
    verdict: Verdict | None = None
    failure: bool = False


def transition(state: State, event: Event, *, first_start: bool = True) -> Transition:
    """What follows from an event.

    first_start: the job has not been requeued before. If preflight refuses a later start, the cause may be temporary,
        because preflight accepted an earlier one: this counts as a failure.

    The caller turns REQUEUE into FAIL if the job has failed too often (`Status.give_up_reason`).
    """
    match event:
        case Event.START:
            # The earlier start ended and reported nothing: it was killed, or its node failed.
            return Transition(State.STARTING, failure=state in (State.STARTING, State.RUNNING))
        case Event.RUNNING:  # another rank may have failed already
            return Transition(State.FAILED if state == State.FAILED else State.RUNNING)
        case Event.STOPPED | Event.FINISHED | Event.REFUSED | Event.FAILED:
            return Transition(State(event.value))
    match state, event:
        case State.FINISHED, Event.JOB_SUCCEEDED | Event.JOB_TERMINATED:
            return Transition(state, Verdict.DONE)
        case _, Event.JOB_TERMINATED:
            return Transition(State.STOPPED, Verdict.DONE)
        case State.STOPPED, Event.JOB_SUCCEEDED:
            return Transition(state, Verdict.REQUEUE)
        case State.STOPPED, Event.JOB_INTERRUPTED:  # the user ended it
            return Transition(state, Verdict.FAIL)
        case State.REFUSED, _ if first_start:
            return Transition(state, Verdict.FAIL)
    return Transition(State.FAILED, Verdict.REQUEUE, failure=True)
