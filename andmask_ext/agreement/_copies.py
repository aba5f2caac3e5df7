"""Copies of an Agreement, and those that come out of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class Copyable:
    """An object that is copied and pickled as the arguments of its constructor.

    So copies of a model, its optimizer and their Agreement belong together. A copy is made when it
    is first used: a model that holds its Agreement is not complete while it is copied. The class
    attribute ``_make`` is its constructor, whatever that of a subclass is.
    """

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor. Raise if there is more to be copied."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        waiting: dict[str, Any] | None = self.__dict__.get("_waiting")
        return self._arguments() if waiting is None else waiting

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__["_waiting"] = state

    @staticmethod
    def _require_idle(is_open: bool, environments: int) -> None:
        """Raise if there is an open context, or if there are environments without an owner."""
        if is_open:
            raise RuntimeError("copy: expected an Agreement outside of its context")
        if environments:
            raise RuntimeError(
                f"copy: {environments} environments wait for their gradients to be written "
                "(write_grads=False); copy the Agreement after the last context of the step"
            )

    if not TYPE_CHECKING:  # for which any attribute would be there

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or "_waiting" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._make(**self.__dict__.pop("_waiting"))
            return getattr(self, name)
