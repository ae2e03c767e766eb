"""The buffer describes the learner and the staleness bound, and commands the learner, by these enums."""

from __future__ import annotations

from enum import StrEnum


class LearnerState(StrEnum):
    """A LearnerState is what the learner does, as the buffer last heard; values are labels in Prometheus."""

    NOT_STARTED = "has not started"
    WAITS_FOR_ANOTHER = "waits for another learner"
    STARTS = "starts"
    WAITS_FOR_GROUPS = "waits for groups"
    WAITS_FOR_DRIVER = "waits for the driver"
    TRAINS = "trains"
    PUBLISHED = "has published"
    SAVES = "saves"
    SAVED = "has saved"
    DIED = "died"
    STOPPED = "was told to stop"


class Owner(StrEnum):
    """An Owner is who has its turn on GPUs that engines and learner share (engines.colocated: sleep)."""

    ENGINES = "engines"
    LEARNER = "learner"


class BoundState(StrEnum):
    """A BoundState says whether the staleness bound lets another group start."""

    OPEN = "open"
    CLOSED = "closed"
    ALL_STARTED = "all groups are started"


class Command(StrEnum):
    """A command tells the learner what to do next."""

    TRAIN = "train"
    SAVE = "save"
    STOP = "stop"
