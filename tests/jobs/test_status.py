"""The table of a run's states: (state, event) -> (state, verdict, whether it counts as a failure)."""

import pytest

from pipeline.jobs.status import Event, State, Verdict, transition

S, E, V = State, Event, Verdict
ENDED = (S.STOPPED, S.FINISHED, S.REFUSED, S.FAILED)
FAILURE = (S.FAILED, V.REQUEUE, True)
TABLE = {
    **{(state, E.START): (S.STARTING, None, False) for state in ENDED},
    (S.STARTING, E.START): (S.STARTING, None, True),
    (S.RUNNING, E.START): (S.STARTING, None, True),
    (S.STARTING, E.JOB_SUCCEEDED): FAILURE,
    (S.RUNNING, E.JOB_SUCCEEDED): FAILURE,
    (S.STOPPED, E.JOB_SUCCEEDED): (S.STOPPED, V.REQUEUE, False),
    (S.FINISHED, E.JOB_SUCCEEDED): (S.FINISHED, V.DONE, False),
    (S.REFUSED, E.JOB_SUCCEEDED): (S.REFUSED, V.FAIL, False),
    (S.FAILED, E.JOB_SUCCEEDED): FAILURE,
    (S.STARTING, E.JOB_INTERRUPTED): FAILURE,
    (S.RUNNING, E.JOB_INTERRUPTED): FAILURE,
    (S.STOPPED, E.JOB_INTERRUPTED): (S.STOPPED, V.FAIL, False),
    (S.FINISHED, E.JOB_INTERRUPTED): FAILURE,
    (S.REFUSED, E.JOB_INTERRUPTED): (S.REFUSED, V.FAIL, False),
    (S.FAILED, E.JOB_INTERRUPTED): FAILURE,
    **{(state, E.JOB_FAILED): FAILURE for state in S if state != S.REFUSED},
    (S.REFUSED, E.JOB_FAILED): (S.REFUSED, V.FAIL, False),
    **{(state, E.JOB_TERMINATED): (S.STOPPED, V.DONE, False) for state in S if state != S.FINISHED},
    (S.FINISHED, E.JOB_TERMINATED): (S.FINISHED, V.DONE, False),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_transition_of_each_state_and_event(state, event):
    assert transition(state, event) == TABLE[state, event]


@pytest.mark.parametrize("event", [E.JOB_SUCCEEDED, E.JOB_INTERRUPTED, E.JOB_FAILED])
def test_refusal_of_a_later_start_counts_as_a_failure(event):
    assert transition(S.REFUSED, event, first_start=False) == FAILURE


def test_stored_strings_do_not_change():
    assert [state.value for state in S] == ["starting", "running", "stopped", "finished", "refused", "failed"]
    assert [int(verdict) for verdict in V] == [0, 1, 75]  # slurm/launch.sh reads the last value
