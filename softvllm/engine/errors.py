"""The front end's refusal as vLLM's own kind of error."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError

from softvllm.core.params import CoTParamsError


class FieldRefusal(VLLMValidationError):
    """A field has the wrong type: status 400. No `ValueError`, so that it passes through pydantic
    validators instead of becoming an entry in pydantic's list of errors."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", parameter=field)

    def __str__(self) -> str:
        return str(self.args[0])


class ThinkRefusal(FieldRefusal):
    """A field that only a think phase cannot bear: without one, stock vLLM serves the request."""


class CoTRequestError(CoTParamsError, VLLMValidationError):
    """A `CoTParamsError` that vLLM's servers answer with status 400 and the field as `param`.

    `AsyncLLM` takes any other exception for a failure of the engine and hides its text.
    """

    def __init__(self, error: CoTParamsError) -> None:
        ValueError.__init__(self, str(error))
        self.field = error.field
        self.parameter = f"cot.{error.field}" if error.field else "cot"
        self.value = None

    @classmethod
    def of(cls, field: str, message: str) -> CoTRequestError:
        """A refusal of our own making."""
        return cls(CoTParamsError(field, message))

    def __str__(self) -> str:
        return ValueError.__str__(self)
