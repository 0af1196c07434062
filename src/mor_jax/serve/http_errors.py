"""What a request is refused with: a status and OpenAI's JSON form, which names field, value and rule."""

import re
from typing import Any

from starlette.responses import JSONResponse

from mor_jax.errors import UserError

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error", 504: "timeout_error"}
_UNREAD = (408, 413)
"""Statuses that leave a part of the request unread."""
_NAMES = ("max_tokens", "min_tokens", "max_depth", "temperature", "top_k", "top_p", "seed", "logprobs", "logit_bias")
_FIELDS = {name: name for name in _NAMES} | {"stop_tokens": "stop_token_ids"}
"""Fields by what the engine calls them."""
CLIENT_LEFT = 499
"""Status, for the record only, of a request whose client did not wait for the answer."""


class ApiError(Exception):
    """A request that gets no completion, or only the beginning of one.

    Args:
        status: of HTTP.
        message: names field, value and rule.
        field: of the request's body, if one is to blame.
        code: a word for programs.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.retry_after = status, message, field, code, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status in _UNREAD:
            headers["Connection"] = "close"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def invalid(field: str | None, message: str) -> ApiError:
    """A field of the body that breaks a rule."""
    return ApiError(400, message, field=field)


def from_user_error(error: UserError, otherwise: str) -> ApiError:
    """Turn a refusal of the engine into one of the request; the message begins with the field, or is about another."""
    named = re.match(rf"({'|'.join(_FIELDS)})[=: ]", str(error))
    return invalid(_FIELDS[named[1]] if named else otherwise, str(error))
