"""The error tree: every error a user can cause is a :class:`GraphwrightError` and says what, where and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class GraphwrightError(Exception):
    """Base of every error graphwright raises on purpose.

    Args:
        what: what is wrong, in one sentence.
        where: the place it was found: a module path, a node, a file, an option.
        hint: what the user can do about it.
        context: lines of IR or of a file shown below the message.
    """

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, context: Sequence[str] = ()
    ) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        self.context = tuple(context)
        lines = [what if where is None else f"{what} (at {where})"]
        lines.extend(f"    {line}" for line in self.context)
        if hint is not None:
            lines.append(f"  -> {hint}")
        super().__init__("\n".join(lines))


class InputError(GraphwrightError):
    """A value handed in by the caller is unusable: an option, an example input, a path."""


class TraceError(GraphwrightError):
    """A model could not be traced into a Program."""


class ProgramError(GraphwrightError):
    """A Program is malformed: the verifier, the parser or the rewriter refused it."""


class TypeMismatch(ProgramError):
    """A value does not have the dtype or shape that its place in the graph needs."""


class PassError(GraphwrightError):
    """A pass failed while it ran. The program was rolled back to the state before it."""


class OrderError(PassError):
    """Passes stand in an order, or follow on something, that cannot give a right result."""


class ContractViolation(PassError):
    """A pass changed what its contract says it keeps. The program was rolled back.

    Attributes:
        pass_name: the kebab-case name of the pass.
    """

    def __init__(
        self,
        what: str,
        *,
        pass_name: str,
        where: str | None = None,
        hint: str | None = None,
        context: Sequence[str] = (),
    ) -> None:
        self.pass_name = pass_name
        super().__init__(what, where=where, hint=hint, context=context)


class SelectionError(InputError):
    """A ``where=`` or ``ignore=`` argument is malformed, or selects nothing though it must select something."""


class RecipeError(InputError):
    """A recipe names an unknown pass or option, or is not valid TOML."""


class SerializationError(GraphwrightError):
    """A Program could not be saved, or a saved one is missing, truncated or of another version."""


class ExportError(GraphwrightError):
    """A Program could not be written for another runtime, or the written file failed its check."""


class BackendError(GraphwrightError):
    """A backend cannot run here, or was asked for something it does not have."""


class GenerationError(GraphwrightError):
    """A decoder gave something that no token can be chosen from."""
