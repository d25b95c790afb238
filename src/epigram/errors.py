"""What epigram raises when the user, a file or the data is at fault.

Every message is one sentence or two that say what is wrong and what to do. The command line prints it and exits
with code 2; a program catches `UserError`.
"""


class UserError(ValueError):
    """A mistake that the user can mend: a wrong option, a missing file, an impossible combination."""


class DataError(UserError):
    """Text, shards, a tokenizer or a data folder that cannot be used as they are."""


class ArtifactError(UserError):
    """A model file that is truncated, altered, hostile, or of a version that this release cannot read."""


class LostPeerError(UserError):
    """Another process of the run failed or was lost. told: whether its message comes from another process."""

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class StoppedError(SystemExit):
    """The run ended early, in all processes alike, as signal `number` had told it to. reason: for the record."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(128 + number)  # what a shell expects
        self.reason = reason
