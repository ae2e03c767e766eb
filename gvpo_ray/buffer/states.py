"""What the buffer says of the learner and of the staleness bound, and what it tells the learner to do."""

from __future__ import annotations

from enum import StrEnum


class LearnerState(StrEnum):
    """What the learner does, as far as the buffer has heard. The values are labels in Prometheus."""

    NOT_STARTED = "has not started"
    STARTS = "starts"
    WAITS_FOR_GROUPS = "waits for groups"
    WAITS_FOR_DRIVER = "waits for the driver"
    TRAINS = "trains"
    PUBLISHED = "has published"
    SAVES = "saves"
    SAVED = "has saved"
    DIED = "died"
    STOPPED = "was told to stop"


class BoundState(StrEnum):
    """Whether the staleness bound lets another group start."""

    OPEN = "open"
    CLOSED = "closed"
    ALL_STARTED = "all groups are started"


class Command(StrEnum):
    """What the learner does next."""

    TRAIN = "train"
    SAVE = "save"
    STOP = "stop"
