"""The exceptions of the distillation runner."""

from __future__ import annotations


class DistillError(Exception):
    """A failure the user can act on; its text is one sentence, shown without a traceback."""


class RunStopped(KeyboardInterrupt):
    """An interruption of a run that can be resumed; ``hint`` says how."""

    def __init__(self, hint: str) -> None:
        super().__init__(hint)
        self.hint = hint


def require(condition: bool, argument: str, contract: str, got: object) -> None:
    """Raises ``DistillError`` in the project's error form unless ``condition`` holds.

    Args:
        condition: What must be true.
        argument: Name of the argument at fault, as the user typed it.
        contract: What the argument must do or be, starting with a verb.
        got: The offending fact.
    """
    if not condition:
        raise DistillError(f"{argument} must {contract}, got {got}")
